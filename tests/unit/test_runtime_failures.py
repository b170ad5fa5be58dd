"""What a worker tells of its failures: the user's once to each driver, after which it serves to save only."""

import pytest
import torch

from checkpoint import Mismatch, NoCheckpoint, Unsupported
from elastic.control.events import Event, MemberFailed, UserFailed, WorldBroken
from elastic.control.instructions import FormWorld, Manner
from elastic.control.standing import BLANK
from elastic.errors import JobRejected, ReplicasDiffer
from elastic.runtime.failures import Failures
from elastic.training.blame import MachineFailure, UserFailure

TRAINS = FormWorld(3, ("w0",), ("h",), Manner.AT_ONCE, "a test")
SAVES = FormWorld(4, ("w0",), ("h",), Manner.AT_ONCE, "a test", only_saves=True)
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def failures(told) -> Failures:
    return Failures("w0", told.append)


@pytest.mark.parametrize(
    "error",
    [
        UserFailure(5, 2, "ValueError: bad sample", ""),
        JobRejected("a model without parameters"),
        Mismatch("a checkpoint of another model"),
        NoCheckpoint("nothing to restore"),
        ReplicasDiffer("one of these machines computes wrongly"),
        Unsupported("a state of a type that has no plain form"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(NO_MEMORY),
        SystemExit(3),
    ],
    ids=repr,
)
def test_who_failed_in_a_world_by_the_users_doing_lives_on_and_serves_those_that_only_save(
    failures, told, error
):
    assert failures.may_serve(TRAINS)
    failures.survive(error, 2, committed=5)
    (failed,) = told
    assert isinstance(failed, UserFailed)
    assert str(error) in failed.message
    assert failed.step == (5 if isinstance(error, UserFailure) else 0)
    assert not failures.may_serve(TRAINS)
    assert failures.may_serve(SAVES)


def test_who_ordered_a_world_that_a_failed_worker_cannot_serve_is_told_again_and_who_greets_it_too(
    failures, told
):
    failures.survive(JobRejected("no data"), 2, committed=5)
    assert not failures.may_serve(TRAINS)
    failures.tell_again()
    assert told == [told[0]] * 3
    assert failures.may_serve(SAVES)
    assert len(told) == 3, "who comes need not say why"


def test_a_failure_that_leaves_no_state_is_told_before_that_so_that_it_is_not_taken_for_a_newcomers(
    failures, told
):
    failures.survive(UserFailure(5, -1, "RuntimeError: halfway", ""), 2, committed=BLANK)
    failed, broken = told
    assert isinstance(failed, UserFailed)
    assert broken == WorldBroken("w0", 2, "the job failed at step 5: RuntimeError: halfway", is_blank=True)


def test_who_fails_again_as_it_saves_is_a_failed_worker_whose_place_others_take(failures, told):
    failures.survive(UserFailure(5, 2, "ValueError: bad sample", ""), 2, committed=5)
    with pytest.raises(RuntimeError, match="cannot be saved: no plain form") as caught:
        failures.survive(Unsupported("no plain form"), 4, committed=5)
    failures.tell(caught.value)
    over = MemberFailed("w0", "RuntimeError: what it holds cannot be saved: no plain form")
    assert told[1:] == [over]
    failures.tell_again()
    assert told[2:] == told[:2], "a new driver would wait for it in vain"


@pytest.mark.parametrize("error", [MachineFailure("ECC error"), OSError("no such device"), TimeoutError()])
def test_what_may_be_the_machines_is_not_lived_on_with(failures, told, error):
    with pytest.raises(type(error)):
        failures.survive(error, 2, committed=5)
    failures.tell(error)
    (failed,) = told
    assert isinstance(failed, MemberFailed)
    assert failures.may_serve(TRAINS), "it never comes to be asked"


@pytest.mark.parametrize("error", [JobRejected("no data"), SystemExit(3)])
def test_what_the_job_raises_before_there_is_a_world_is_told_with_its_reason(failures, told, error):
    failures.tell(error)
    (failed,) = told
    assert isinstance(failed, UserFailed)
    assert str(error) in failed.message
    failures.tell_again()
    assert told == [failed, failed]
