"""What is made of Ray's errors: who is dead, who is only silent, and what is the user's own."""

import logging
from functools import partial
from typing import NoReturn

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RpcError,
    RuntimeEnvSetupError,
)

from elastic.control.events import Cause, MemberLost, MemberReady, UserFailed
from elastic.runtime.answers import Answers, living
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
    assert Answers().take("w0", lambda: answer) is answer
    for error in (
        ActorUnavailableError("the connection broke", None),
        GetTimeoutError("it takes long"),
        RpcError("the connection was reset"),
    ):
        assert Answers().take("w0", partial(raising, error)) is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ActorDiedError(), Cause.PROCESS_DIED),
        (ActorUnschedulableError("no node has so many CPUs"), Cause.START_FAILED),
        (OutOfMemoryError("the node is running low on memory"), Cause.PROCESS_DIED),
        (ActorPlacementGroupRemoved(), Cause.PROCESS_DIED),
        (NodeDiedError("its node is gone"), Cause.HOST_DIED),
    ],
)
def test_a_member_whose_actor_died_or_never_was_is_lost_with_its_cause(error, cause):
    lost = Answers().take("w0", lambda: raising(error))
    assert isinstance(lost, MemberLost)
    assert (lost.member, lost.cause) == ("w0", cause)
    assert lost.evidence.startswith("Ray: ")


def test_ray_says_why_a_member_was_killed():
    lost = Answers().take("w0", lambda: raising(OutOfMemoryError("the node is running low on memory")))
    assert isinstance(lost, MemberLost)
    assert "low on memory" in lost.evidence


def test_an_environment_that_cannot_be_set_up_is_what_the_user_asked_for_in_rays_words():
    failed = Answers().take("w3", lambda: raising(RuntimeEnvSetupError("no such working_dir: /code")))
    assert isinstance(failed, UserFailed)
    assert failed.member == "w3"
    assert "environment of w3" in failed.message
    assert "no such working_dir" in failed.message


def test_an_environment_in_which_a_member_has_come_up_is_no_mistake_and_who_lacks_it_is_lost_alone():
    answers = Answers()
    answers.take("w0", lambda: Answer((MemberReady("w0", "h", 1),)))
    lost = answers.take("w3", partial(raising, RuntimeEnvSetupError("the index is away")))
    assert isinstance(lost, MemberLost)
    assert (lost.member, lost.cause) == ("w3", Cause.START_FAILED)
    assert "environment of w3" in lost.evidence
    assert "the index is away" in lost.evidence


def test_an_error_that_says_nothing_of_the_actor_is_no_loss_and_is_raised():
    with pytest.raises(RaySystemError):
        Answers().take("w0", lambda: raising(RaySystemError("out of file descriptors")))
