"""The store or the process dies at its k-th write, for every k: what was acknowledged is whole."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from checkpoint import Catalog, LatestN, LocalHost, Saver, Store, open_store, prune
from checkpoint.format.keys import INDEX, PACKS, PROMOTING, SWEEPS
from checkpoint.lifecycle.survey import objects_of
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_scenarios import NUM_KEPT, NUM_STEPS, SCENARIOS, Stores
from tests.fault.checkpoint_victims import (
    Acknowledged,
    Open,
    acknowledged_in,
    live,
    lost_from,
    points_of,
    stores_of,
    stores_struck,
)
from tests.fault.checkpoint_worlds import (
    MIB,
    QUICK,
    RAW,
    assert_whole,
    durable_steps,
    run_state,
    save_alone,
)
from tests.wrapped_stores import Fault, Faulty, Lost, Metered, Short, Unanswered

STEPS = (1, 2, 3)
NUM_WRITES = 4 * len(STEPS)  # each step: a pack, a page, a receipt, the manifest
MIN_POINTS = {"shared": 12, "deltas": 12, "two hosts": 20, "promoted": 24, "pruned": 20}
# What is written in any case, whoever wins a race: each of two hosts writes all but the manifest, which one
# of them writes or both try to; copies and sweeps may find less to do than in the run that was counted.
NUM_CERTAIN = {
    "shared": NUM_WRITES,
    "deltas": NUM_WRITES,
    "two hosts": 2 * 3 * len(STEPS),
    "promoted": NUM_WRITES,
    "pruned": NUM_WRITES,
}


@pytest.fixture
def ramdisk() -> Iterator[Path]:
    """A directory in memory, if there is one: a killed process leaves the page cache, so it is as good."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="hf-", dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)


def save_steps(store: Store, steps: tuple[int, ...] = STEPS, generation: int = 0) -> set[int]:
    """Save some steps one after the other; return those that were acknowledged."""
    acknowledged: set[int] = set()
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        for step in steps:
            acknowledged |= set(durable_steps(save_alone(saver, step, generation)))
        saver.close()
    return acknowledged


def assert_nothing_lost(stores: Stores, acknowledged: Acknowledged, scenario: str) -> None:
    """Prove that both stores are whole, and hold what was acknowledged and no policy let expire."""
    near = acknowledged.get("near", set())
    if scenario == "pruned":
        near = near & set(sorted(near | set(Catalog(stores.sound).steps()))[-NUM_KEPT:])
    assert_whole(stores.sound, near, run_state)
    assert_whole(stores.far, acknowledged.get("far", set()), run_state)


def assert_goes_on(stores: Stores, scenario: str) -> None:
    """Prove that a successor saves as if nothing had been, and that nothing is left over by a last prune."""
    reached = Catalog(stores.sound).latest() or 0
    acknowledged = live(scenario, stores, generation=2)
    assert acknowledged["near"] == set(range(reached + 1, reached + NUM_STEPS + 1))
    assert_nothing_lost(stores, acknowledged, scenario)
    for store in (stores.sound, stores.far):
        if Catalog(store).steps():
            prune(store, [LatestN(1)], now_s=time.time(), grace_s=0)
            (named,) = [objects_of(Catalog(store).manifest(step)) for step in Catalog(store).steps()]
            left = {entry.key for prefix in (PACKS, INDEX) for entry in store.list(prefix)}
            assert {ref.key for ref in named} == left
            assert [entry.key for prefix in (PROMOTING, SWEEPS) for entry in store.list(prefix)] == []


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


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_store_that_dies_at_any_write_of_a_scenario_costs_nothing_that_was_acknowledged(scenario):
    points = points_of(scenario, MemoryStore)
    assert len(points) >= MIN_POINTS[scenario]
    for point in points:
        stores = {name: MemoryStore(name) for name in ("near", "far")}
        acknowledged = live(scenario, stores_struck(stores.__getitem__, point, lost_from(point)))
        sound = stores_of(stores.__getitem__, lambda _, store: store)
        assert_nothing_lost(sound, acknowledged, scenario)
        assert_goes_on(sound, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Lost, Unanswered])
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "two hosts"])
def test_any_one_write_of_a_scenario_that_is_lost_or_not_answered_tears_nothing(scenario, fault):
    for point in points_of(scenario, MemoryStore):
        stores = {name: MemoryStore(name) for name in ("near", "far")}
        struck = stores_struck(stores.__getitem__, point, [fault(point.verb, point.nth)])
        acknowledged = live(scenario, struck)
        assert_nothing_lost(stores_of(stores.__getitem__, lambda _, store: store), acknowledged, scenario)


def _directories_in(root: Path) -> Open:
    return lambda name: open_store(str(root / name))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_process_that_is_killed_at_any_write_of_a_scenario_loses_nothing_that_was_acknowledged(
    scenario, ramdisk
):
    command = [sys.executable, "-m", "tests.fault.checkpoint_victims", str(ramdisk), scenario]
    subprocess.run(command, check=True, timeout=100)
    points = json.loads((ramdisk / "points.json").read_text())
    assert len(points) >= MIN_POINTS[scenario]
    survivors = json.loads((ramdisk / "survived.json").read_text())  # they proved that they never got there
    assert len(points) - len(survivors) >= NUM_CERTAIN[scenario], survivors
    num_acknowledged = 0
    for number in range(len(points)):
        root = ramdisk / str(number)
        stores = stores_of(
            partial(lambda root, name: open_store(str(root / name)), root), lambda _, store: store
        )
        acknowledged = acknowledged_in(root)
        num_acknowledged += len(acknowledged["near"])
        assert_nothing_lost(stores, acknowledged, scenario)
        assert_goes_on(stores, scenario)
    assert num_acknowledged > len(points) // 2, "most victims died before they could lose anything"
