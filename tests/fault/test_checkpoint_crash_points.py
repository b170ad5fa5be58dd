"""The store or the process dies at its k-th write, for every k: what was acknowledged is whole."""

import subprocess
import sys

import pytest

from checkpoint import Catalog, LocalHost, NoCheckpoint, Saver, Store, load, open_store, verify
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import Fault, Faulty, Lost, Metered, Short, Unanswered
from tests.fault.checkpoint_worlds import (
    MIB,
    QUICK,
    RAW,
    durable_steps,
    same_bits,
    save_alone,
    small_state,
)
from tests.unit.test_engine_worlds import World

STEPS = (1, 2, 3)
NUM_WRITES = 4 * len(STEPS)  # each step: a pack, a page, a receipt, the manifest


def save_steps(store: Store, steps: tuple[int, ...] = STEPS, generation: int = 0) -> set[int]:
    """Save some steps one after the other; return those that were acknowledged."""
    acknowledged: set[int] = set()
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        for step in steps:
            acknowledged |= set(durable_steps(save_alone(saver, step, generation)))
        saver.close()
    return acknowledged


def assert_whole(store: Store, acknowledged: set[int]) -> None:
    """Prove that every checkpoint that exists is whole, and every acknowledged one exists."""
    steps = Catalog(store).steps()
    assert acknowledged <= set(steps)
    assert Catalog(store).latest() == (max(steps) if steps else None)
    for step in steps:
        assert same_bits(load(store, step).state, small_state(step))
    if steps:
        assert load(store).manifest.step == max(steps) and load(store).report.fallbacks == ()
        assert verify(store).num_bad == 0
    else:
        with pytest.raises(NoCheckpoint):
            load(store)


def test_there_are_as_many_writes_as_these_tests_think():
    metered = Metered(MemoryStore("count"))
    assert save_steps(metered) == set(STEPS)
    assert metered.traffic().num_calls["put_new"] == NUM_WRITES
    assert metered.traffic().num_calls.get("put", 0) == 0


@pytest.mark.parametrize("k", range(1, NUM_WRITES + 1))
def test_a_store_that_dies_at_its_kth_write_leaves_the_newest_checkpoint_whole(k):
    store = MemoryStore("dies")
    acknowledged = save_steps(Faulty(store, [Lost("put_new", nth) for nth in range(k, 4 * NUM_WRITES)]))
    assert acknowledged == {step for step in STEPS if 4 * step < k}
    assert_whole(store, acknowledged)
    assert save_steps(store, generation=1) == set(STEPS)
    assert_whole(store, set(STEPS))


@pytest.mark.parametrize("k", range(1, NUM_WRITES + 1))
def test_a_write_whose_answer_is_lost_costs_at_most_its_own_step(k):
    store = MemoryStore("unanswered")
    acknowledged = save_steps(Faulty(store, [Unanswered("put_new", k)]))
    assert len(acknowledged) == len(STEPS) - 1
    assert_whole(store, acknowledged)


@pytest.mark.parametrize("verb", ["read", "list"])
@pytest.mark.parametrize("k", range(1, 5))
def test_a_failed_read_or_listing_costs_at_most_its_own_step(verb, k):
    store = MemoryStore("reads")
    faults: list[Fault] = [Lost(verb, k)] if verb == "list" else [Lost(verb, k), Short(k + 2)]
    acknowledged = save_steps(Faulty(store, faults))
    assert acknowledged
    assert_whole(store, acknowledged)


@pytest.mark.parametrize("k", range(1, 9))
def test_two_hosts_of_which_one_s_store_dies_at_its_kth_write_agree_on_what_exists(k):
    """Host b dies for good; host a waits until a newer generation is claimed; what was whole stays."""
    store = MemoryStore("pair")
    world = World(store, ("a", "b"))
    broken = Faulty(store, [Lost("put_new", nth) for nth in range(k, 100)])
    world.locals["b"].close()
    world.locals["b"] = LocalHost(broken, "b", arena_bytes=MIB, tuning=QUICK)
    world.savers[1].close()
    world.savers[1] = Saver(world.locals["b"], "run", RAW)
    acknowledged: set[int] = set()
    for step in STEPS[:2]:
        world.save_equal(step)
        store.put(f"control/generations/{step + 1:06d}", b'{"token": ""}')
        for seen in world.outcomes():
            acknowledged |= set(durable_steps(seen))
    world.close()
    assert_whole(store, acknowledged)


@pytest.mark.slow
def test_a_process_that_is_killed_at_its_kth_write_leaves_the_newest_checkpoint_whole(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "tests.fault.checkpoint_victims", str(tmp_path), str(NUM_WRITES)],
        check=True,
        timeout=60,
    )
    roots = [tmp_path / str(k) for k in range(1, NUM_WRITES + 1)]
    for k, root in enumerate(roots, 1):
        store = open_store(str(root / "store"))
        told = root / "acknowledged"
        acknowledged = {int(line) for line in told.read_text().split()} if told.exists() else set()
        assert acknowledged == {step for step in STEPS if 4 * step < k}
        assert_whole(store, acknowledged)
