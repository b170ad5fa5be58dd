"""What is asked aside: its answer or its error comes, and whoever asked lives on meanwhile."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elastic.runtime.aside import asked_aside

WAIT_S = 20.0


class Enough(Exception):
    pass


def test_an_answer_that_is_there_at_once_comes_without_another_thing_being_done():
    assert asked_aside(lambda: 7, pytest.fail) == 7


def test_an_answer_is_waited_for_while_other_things_are_done():
    may_answer = threading.Event()
    looked: list[int] = []

    def live_on() -> None:
        looked.append(len(looked))
        if len(looked) == 3:
            may_answer.set()

    assert asked_aside(lambda: may_answer.wait(WAIT_S), live_on)
    assert len(looked) >= 3


def test_an_error_comes_as_it_is_also_one_of_time():
    def fail() -> None:
        raise TimeoutError("the store's own")

    with pytest.raises(TimeoutError, match="the store's own"):
        asked_aside(fail, lambda: None)


def test_who_has_had_enough_waits_no_longer():
    may_answer = threading.Event()

    def live_on() -> None:
        raise Enough

    with pytest.raises(Enough):
        asked_aside(lambda: may_answer.wait(WAIT_S), live_on)
    may_answer.set()


def test_what_is_done_aside_does_not_keep_the_process_from_ending():
    begin = "import time; from elastic.runtime.aside import begun_aside; begun_aside(lambda: time.sleep(600))"
    subprocess.run([sys.executable, "-c", begin], check=True, timeout=100, cwd=Path(__file__).parents[2])
