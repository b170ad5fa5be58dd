"""What the cluster makes of Ray's errors: who is dead, and who is only silent."""

import logging
from typing import NoReturn

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayError,
    RaySystemError,
)

from elastic.control.events import Cause, MemberLost
from elastic.runtime.cluster import answer_of, living
from elastic.runtime.notices import Answer


def test_a_named_actor_that_is_dying_or_unknown_is_taken_for_lost_and_said(caplog):
    def actor_of(name: str) -> object:
        if name == "w1":
            raise ValueError("Failed to look up actor with name 'w1'")
        if name == "w2":
            raise RaySystemError("the control store did not answer")
        return name.upper()

    with caplog.at_level(logging.WARNING):
        assert dict(living(["w0", "w1", "w2", "w3"], actor_of)) == {"w0": "W0", "w3": "W3"}
    assert ["w1, which" in caplog.text, "did not answer" in caplog.text] == [True, True]


def raising(error: RayError) -> NoReturn:
    raise error


def test_a_member_that_ray_cannot_reach_for_now_is_silent_and_not_lost():
    answer = Answer((), 0.5)
    assert answer_of("w0", lambda: answer) is answer
    assert answer_of("w0", lambda: raising(ActorUnavailableError("the connection broke", None))) is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ActorDiedError(), Cause.PROCESS_DIED),
        (ActorUnschedulableError("no node has so many CPUs"), Cause.START_FAILED),
    ],
)
def test_a_member_whose_actor_died_or_never_was_is_lost_with_its_cause(error, cause):
    lost = answer_of("w0", lambda: raising(error))
    assert isinstance(lost, MemberLost)
    assert (lost.member, lost.cause) == ("w0", cause)
    assert lost.evidence.startswith("Ray: ")


def test_an_error_that_says_nothing_of_the_actor_is_no_loss_and_is_raised():
    with pytest.raises(RaySystemError):
        answer_of("w0", lambda: raising(RaySystemError("out of file descriptors")))
