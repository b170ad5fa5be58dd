"""Silent members are examined and ended a few at a time, and not at all once the run is another driver's."""

import threading
from functools import partial

from elastic.runtime.autopsies import MAX_AUTOPSIES, Autopsies


def test_each_is_examined_and_then_ended_whatever_came_of_that() -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("examined")
        raise OSError("its host is gone")

    autopsies = Autopsies()
    autopsies.begin(fail, lambda: done.append("ended"))
    autopsies.close()
    assert done == ["examined", "ended"]


def test_those_that_are_under_way_or_wait_for_their_turn_end_nobody_once_they_are_called_off() -> None:
    may_go_on, are_under_way, ended = threading.Event(), threading.Semaphore(0), list[int]()

    def examine() -> None:
        are_under_way.release()
        may_go_on.wait(20)

    autopsies = Autopsies()
    for number in range(2 * MAX_AUTOPSIES):
        autopsies.begin(examine, partial(ended.append, number))
    assert all(are_under_way.acquire(timeout=20) for _ in range(MAX_AUTOPSIES))
    autopsies.call_off()
    may_go_on.set()
    autopsies.close()
    assert ended == []
