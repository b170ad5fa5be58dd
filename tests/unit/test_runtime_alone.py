"""Workers without a driver save alone: the newest step becomes durable, whoever claims first."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint import Catalog, LocalHost, Saver, Share, Store, newest_generation, open_store
from elastic.runtime import alone
from elastic.runtime.alone import MAX_TRIES, Survivor, keep_ray, save_alone
from elastic.runtime.claims import Claims, claim_alone
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, small_state


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(f"file://{tmp_path}")


def saving(store: Store, step: int) -> Callable[[int], bool]:
    """Save a step for real, in the generation that was claimed."""

    def save(generation: int) -> bool:
        with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
            saver = Saver(host, "run", RAW)
            saver.save(step, small_state(step), Share.alone(generation=generation), {})
            is_done = saver.drain(20)
            saver.close()
        return is_done

    return save


def no_wait(_seconds: float) -> None:
    """Look again at once."""


def test_who_loses_the_claim_to_one_of_an_older_step_saves_the_newest_after_it(store: Store) -> None:
    assert claim_alone(store, 1, "w0")
    assert saving(store, 7)(1), "another survivor saves an older step"
    save_alone(store, Survivor("w1", 8, saving(store, 8)), no_wait)
    assert Catalog(store).latest() == 8


def test_whoever_takes_the_claim_between_two_looks_a_survivor_claims_the_one_after(store: Store) -> None:
    tried: list[int] = []

    def lose_first(generation: int) -> bool:
        tried.append(generation)
        return len(tried) > 1 and saving(store, 8)(generation)

    save_alone(store, Survivor("w1", 8, lose_first), no_wait)
    assert tried == [1, 2]
    assert Catalog(store).latest() == 8


def test_a_step_that_another_one_saves_meanwhile_is_not_saved_again(store: Store) -> None:
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            saving(store, 8)(1)

    def fail(generation: int) -> bool:
        claimed.append(generation)
        return False

    claimed: list[int] = []
    save_alone(store, Survivor("w1", 8, fail), wait)
    assert claimed == [1]
    assert len(looks) == 3


def test_what_is_durable_already_claims_nothing(store: Store) -> None:
    saving(store, 8)(1)
    before = newest_generation(store)
    save_alone(store, Survivor("w1", 8, saving(store, 8)), no_wait)
    assert newest_generation(store) == before


def test_a_survivor_whose_saves_fail_gives_up_and_a_driver_passes_over_its_claims(store: Store) -> None:
    save_alone(store, Survivor("w1", 8, lambda _: False), no_wait)
    driver = Claims(store, "run")
    assert driver.newest == MAX_TRIES
    driver.take_over()


def test_a_survivor_to_which_a_driver_comes_leaves_the_saving_to_it(store: Store) -> None:
    is_orphaned = iter((True, False))
    survivor = Survivor("w1", 8, lambda _: False, lambda: next(is_orphaned))
    save_alone(store, survivor, no_wait)
    assert newest_generation(store) == 1


def test_a_worker_that_lost_its_driver_keeps_its_local_ray_for_as_long_as_a_save_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "RENEW_EVERY_S", 0.01)
    lease, looks = tmp_path / "lease", []
    lease.touch()
    os.utime(lease, (1.0, 1.0))
    enough = threading.Event()

    def is_orphaned() -> bool:
        looks.append(lease.stat().st_mtime)
        if len(looks) == 10:  # five more were allowed
            os.utime(lease, (1.0, 1.0))
        if len(looks) == 20:
            enough.set()
        return len(looks) > 3

    keep_ray(lease, is_orphaned, most_s=0.05)
    assert enough.wait(30)
    assert looks[:4] == [1.0] * 4, "it has a driver"
    assert looks[4] > time.time() - 60
    assert looks[-5:] == [1.0] * 5, "one that hangs does not keep it"
