"""The lane beside the training: order, what breaks it, and that nothing of it outlives its world."""

import gc
import threading
import weakref

import pytest

from elastic.runtime.lane import ThreadLane
from elastic.training.ports import Broken


class Held:
    """Something that work refers to."""


def test_work_runs_beside_the_caller_in_the_order_of_its_starts():
    lane, may_go = ThreadLane(), threading.Event()
    done: list[object] = []
    lane.start(lambda: done.append(may_go.wait(5)))
    lane.start(lambda: done.append(2))
    assert done == [], "the caller was not held up"
    may_go.set()
    lane.join()
    assert done == [True, 2]
    lane.close()


def test_what_broke_is_told_at_every_join_and_nothing_after_it_runs():
    lane, done = ThreadLane(), []

    def breaks() -> None:
        raise Broken(7, "a peer died")

    lane.start(breaks)
    lane.start(lambda: done.append(1))
    for _ in range(2):
        with pytest.raises(Broken, match="world 7: a peer died"):
            lane.join()
    lane.close()
    assert done == []


def test_a_closed_lane_has_dropped_its_work_and_ends_its_thread():
    lane, blocked = ThreadLane(), threading.Event()
    held = Held()
    watched, num_before = weakref.ref(held), threading.active_count()

    def work(each: Held = held) -> None:
        blocked.wait(5)
        raise Broken(1, f"cut while it held {each}")

    lane.start(work)
    lane.start(work)
    del work, held
    threading.Timer(0.05, blocked.set).start()
    lane.close()
    gc.collect()
    assert watched() is None
    assert threading.active_count() <= num_before + 1  # the timer's may still be ending


def test_a_lane_that_never_ran_anything_joins_and_closes_at_once():
    lane = ThreadLane()
    lane.join()
    lane.close()
