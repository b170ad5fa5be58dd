"""Worlds that only save: of those who are left, or will be taken away; who has saved is free to go."""

from dataclasses import replace

from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Ending,
    GenerationTaken,
    MemberEnded,
    MemberLeaving,
    MemberLost,
    MemberReady,
    Settled,
    StopRequested,
)
from elastic.control.instructions import End, FormWorld, ReleaseMember, StartMember, Status, StopWorld
from elastic.control.phase import Phase
from tests.controlled import pass_time, training


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


def test_who_leaves_makes_room_for_its_replacement_as_soon_as_all_have_saved() -> None:
    controller = training(1)
    assert StopWorld(1, "all workers that hold the state will be taken away") in controller.handle(
        left("w0"), 3.0
    )
    released = controller.handle(MemberEnded("w0", 1, 4, Ending.STOPPED), 4.0)
    assert released == [ReleaseMember("w0", "drained")], "w1 may wait for just this place"
    assert controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 4.1) == []
    (formed,) = controller.handle(MemberReady("w1", "h", 2), 200.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w1",)
    assert controller.roll.origin == "store"
    assert controller.losses.num == 0


def test_who_is_told_to_leave_once_all_is_safe_leaves_at_once_and_is_replaced() -> None:
    controller = training(2)
    safe(controller, "w0", "w1")
    assert controller.handle(MemberReady("w2", "h", 2), 5.0) == []
    assert controller.handle(left("w2"), 6.0) == [ReleaseMember("w2", "drained"), StartMember("w4")]
    assert controller.handle(left("w3"), 6.1) == [ReleaseMember("w3", "drained"), StartMember("w5")]


def test_where_all_have_saved_and_left_as_many_as_a_world_needs_at_least_go_on_at_once() -> None:
    controller = training(3)
    safe(controller, "w0", "w1", "w2")
    controller.policy = replace(controller.policy, min_workers=2)
    assert controller.handle(MemberReady("w3", "h", 3), 5.0) == []
    (formed,) = controller.handle(MemberReady("w4", "h", 4), 6.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w3", "w4")


def test_where_all_have_saved_and_left_newcomers_are_waited_for_as_long_as_replacements_are() -> None:
    controller = training(1)
    safe(controller, "w0")
    assert pass_time(controller, 4.0, 4.0 + controller.policy.wait_s - 1.0) == []
    (end,) = pass_time(controller, 303.0, 310.0)
    assert isinstance(end, End) and end.status is Status.FAILED, "there is nothing left to save"


def safe(controller: Controller, *members: str) -> None:
    """Let all members of the first world leave, and save; fewer make no world."""
    controller.policy = replace(controller.policy, min_workers=len(members))
    for member in members:
        controller.handle(left(member), 3.0)
    told = [
        one for member in members for one in controller.handle(MemberEnded(member, 1, 4, Ending.STOPPED), 4.0)
    ]
    assert told == [ReleaseMember(member, "drained") for member in members]


def left(member: str) -> MemberLeaving:
    """Tell that a member will be taken away."""
    return MemberLeaving(member, "drained")
