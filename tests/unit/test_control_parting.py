"""Worlds that only save: of those who are left, or will be taken away; who has saved is free to go."""

from dataclasses import replace

from elastic.control.controller import Phase
from elastic.control.events import (
    Cause,
    Ending,
    GenerationTaken,
    MemberEnded,
    MemberLeaving,
    MemberLost,
    Settled,
    StopRequested,
)
from elastic.control.instructions import End, FormWorld, Status, StopWorld
from tests.controlled import training


def test_who_is_left_of_a_broken_world_and_will_be_taken_away_saves_without_another_step() -> None:
    controller = training(3)
    for member in ("w0", "w1", "w2"):
        controller.handle(left(member), 3.0)
    (last,) = (
        one
        for one in controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 3.1)
        if isinstance(one, FormWorld)
    )
    assert last.only_saves and "before they are taken away" in last.reason
    for member in last.members:
        controller.handle(Settled(member, last.generation, 5, "self", 0.1), 6.5)
    for member in last.members:
        told = controller.handle(MemberEnded(member, last.generation, 5, Ending.STOPPED), 7.0)
        assert not any(isinstance(one, FormWorld | StopWorld | End) for one in told)
    assert controller.phase is Phase.GATHERING, "it waits for newcomers"


def test_a_world_that_only_saves_stays_one_where_somebody_who_saved_alone_has_its_generation() -> None:
    controller = training(2)
    controller.handle(StopRequested("test"), 3.0)
    (last,) = controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 3.1)
    (again,) = controller.handle(GenerationTaken(2), 3.2)
    assert isinstance(last, FormWorld) and last.only_saves
    assert again == replace(last, generation=3)
    assert controller.roll.is_closing


def test_a_world_that_only_saves_the_last_step_has_finished_the_run() -> None:
    controller = training(2)
    controller.roll.last_step = 5
    controller.handle(StopRequested("test"), 3.0)
    controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 3.1)
    controller.handle(Settled("w0", 2, 5, "self", 0.1), 3.5)
    (end,) = controller.handle(MemberEnded("w0", 2, 5, Ending.FINISHED), 4.0)
    assert isinstance(end, End) and end.status is Status.FINISHED


def left(member: str) -> MemberLeaving:
    """Tell that a member will be taken away."""
    return MemberLeaving(member, "drained")
