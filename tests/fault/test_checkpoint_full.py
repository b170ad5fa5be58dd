"""A store that is full: what does not fit fails its own step, loudly; what fits is whole; room heals it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint import Catalog, Failed, LocalHost, Outcome, Saver, Share, Store, open_store
from checkpoint.errors import StoreRefused
from checkpoint.lifecycle.promotion import promote
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, assert_whole, durable_steps, run_state
from tests.wrapped_stores import Faulty, Full, Metered

STEPS = range(1, 5)
NUM_ROOMS = 24


def save(store: Store, generation: int = 0) -> list[Outcome]:
    """Save all steps, one after the other; return what became of them."""
    seen: list[Outcome] = []
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        for step in STEPS:
            saver.save(step, run_state(step), Share.alone(generation=generation), {})
            assert saver.drain(20)
            seen += saver.outcomes()
        saver.close()
    return seen


@pytest.fixture
def num_bytes() -> int:
    """How many bytes all steps take."""
    metered = Metered(MemoryStore("size"))
    assert durable_steps(tuple(save(metered))) == list(STEPS)
    return metered.traffic().num_bytes["put_new"]


@pytest.mark.slow
def test_with_any_room_every_step_is_whole_or_reported_and_room_heals_it(num_bytes):
    nums_durable = set()
    for room in range(0, num_bytes, num_bytes // NUM_ROOMS):
        store = MemoryStore("full")
        outcomes = save(Faulty(store, [Full(room)]))
        durable = set(durable_steps(tuple(outcomes)))
        nums_durable.add(len(durable))
        failed = [one for one in outcomes if isinstance(one, Failed)]
        assert durable | {one.step for one in failed} == set(STEPS) and failed
        assert all("no space left" in one.why for one in failed)
        assert_whole(store, durable, run_state)
        assert durable_steps(tuple(save(store, generation=1))) == list(STEPS)
        assert_whole(store, STEPS, run_state)
    assert nums_durable == set(range(len(STEPS)))


def test_a_promotion_to_a_store_with_any_room_is_whole_or_absent_there(num_bytes):
    near = MemoryStore("near")
    save(near)
    num_refused = 0
    for room in range(0, num_bytes, num_bytes // NUM_ROOMS):
        far = MemoryStore("far")
        full, promoted = Faulty(far, [Full(room)]), set()
        for step in STEPS:
            try:
                promote(near, full, step)
                promoted.add(step)
            except StoreRefused:
                num_refused += 1
        assert_whole(far, promoted, run_state)
        for step in STEPS:
            promote(near, far, step)
        assert_whole(far, STEPS, run_state)
    assert num_refused > NUM_ROOMS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("to make a small file system takes root, and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_fails_steps_and_tears_none(small_disk):
    store = open_store(str(small_disk / "store"))
    outcomes = save(store)
    failed = [one for one in outcomes if isinstance(one, Failed)]
    assert failed and all("No space left" in one.why for one in failed)
    durable = durable_steps(tuple(outcomes))
    assert durable
    assert_whole(store, durable, run_state)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert durable_steps(tuple(save(store, generation=1))) == list(STEPS)
    assert_whole(store, STEPS, run_state)
    assert Catalog(store).steps() == list(STEPS)
