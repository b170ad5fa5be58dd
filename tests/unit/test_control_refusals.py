"""Jobs that raise: what is held is saved before the run ends, and who holds nothing yet is only replaced."""

import pytest

from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Ending,
    MemberBuilding,
    MemberCame,
    MemberEnded,
    MemberLost,
    MemberReady,
    Settled,
    StepCommitted,
    UserFailed,
    WorkersWanted,
)
from elastic.control.instructions import End, FormWorld, Instruction, KillMember, StartMember, Status
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy
from tests.controlled import pass_time, stepping, tell_all, training

WHY = "ValueError: bad sample in shard 17"


def raised(member: str, step: int = 1) -> UserFailed:
    """Tell that a member's job raised."""
    return UserFailed(member, 0, step, WHY, "")


def last_world(told: list[Instruction]) -> FormWorld:
    """The world that these instructions order, which makes no step."""
    (last,) = (one for one in told if isinstance(one, FormWorld))
    assert last.only_saves
    return last


def test_where_the_job_raises_its_holders_save_the_state_before_the_run_ends_as_failed() -> None:
    controller = stepping(2)
    last = last_world(controller.handle(raised("w1"), 4.0))
    assert last.members == ("w0", "w1"), "it may hold a shard that nobody else has"
    assert controller.handle(raised("w0"), 4.1) == [], "it saves all the same"
    tell_all(controller, "w0", "w1", at=4.2)
    controller.handle(MemberEnded("w0", last.generation, 1, Ending.STOPPED), 5.0)
    (end,) = controller.handle(MemberEnded("w1", last.generation, 1, Ending.STOPPED), 5.0)
    assert end == End(Status.FAILED, WHY)


def test_the_only_worker_saves_what_it_held_when_the_job_raised() -> None:
    controller = stepping(1)
    last = last_world(controller.handle(raised("w0"), 4.0))
    controller.handle(Settled("w0", last.generation, 1, "self", 0.1), 4.2)
    assert controller.handle(MemberEnded("w0", last.generation, 1, Ending.STOPPED), 5.0) == [
        End(Status.FAILED, WHY)
    ]


def test_who_raised_and_cannot_come_to_the_last_world_is_left_out_of_it() -> None:
    controller = stepping(2)
    last = last_world(controller.handle(raised("w1"), 4.0))
    controller.handle(MemberCame("w0", last.generation), 4.1)
    killed, again = pass_time(controller, 4.1, 70.0)
    assert isinstance(killed, KillMember) and killed.member == "w1"
    assert last_world([again]).members == ("w0",)


def test_where_all_raised_and_none_can_save_the_run_ends_after_a_minute() -> None:
    controller = stepping(2)
    controller.handle(raised("w1"), 4.0)
    controller.handle(raised("w0"), 4.1)
    told = pass_time(controller, 4.1, 70.0)
    assert isinstance(told[-1], End) and told[-1].status is Status.FAILED
    assert WHY in told[-1].reason


def test_who_raises_as_it_saves_is_left_out_and_the_others_save() -> None:
    controller = stepping(2)
    last = last_world(controller.handle(raised("w1"), 4.0))
    for member in ("w0", "w1"):
        controller.handle(MemberCame(member, last.generation), 4.2)
    assert controller.handle(raised("w1"), 4.25) == [], "it was told twice"
    killed, again = controller.handle(raised("w1", 2), 4.3)
    assert isinstance(killed, KillMember) and killed.member == "w1"
    assert last_world([again]).members == ("w0",)


@pytest.mark.parametrize("controller", [training(2), Controller(WorldPolicy(workers=2), "w")])
def test_where_nothing_was_committed_there_is_nothing_to_save_and_the_run_ends_at_once(
    controller: Controller,
) -> None:
    if controller.phase is Phase.GATHERING:
        controller.begin((), 0.0)
    assert controller.handle(raised("w0", 0), 4.0) == [End(Status.FAILED, WHY)]


def test_a_starting_member_whose_job_raises_is_replaced_and_the_world_trains_on() -> None:
    controller = stepping(2)
    controller.handle(WorkersWanted(3), 3.5)
    killed, started = controller.handle(raised("w2", 0), 4.0)
    assert isinstance(killed, KillMember) and (killed.member, killed.reason) == ("w2", WHY)
    assert started == StartMember("w3")
    assert controller.phase is Phase.TRAINING


def test_a_joiner_that_raises_before_it_has_the_state_is_replaced_and_the_others_go_on() -> None:
    controller = stepping(2)
    controller.handle(WorkersWanted(3), 3.5)
    controller.handle(MemberReady("w2", "h", 9), 3.6)
    told = controller.handle(raised("w2", 0), 4.0)
    (formed,) = (one for one in told if isinstance(one, FormWorld))
    assert formed.members == ("w0", "w1") and not formed.only_saves


def test_the_third_newcomer_whose_job_raises_ends_the_run_once_the_state_is_saved() -> None:
    controller = stepping(2)
    controller.handle(WorkersWanted(3), 3.5)
    for member in ("w2", "w3"):
        controller.handle(raised(member, 0), 4.0)
    pass_time(controller, 4.0, 5.5)
    assert "w4" in controller.members.starting
    told = controller.handle(raised("w4", 0), 5.6)
    assert not any(isinstance(one, StartMember | End) for one in told)
    assert controller.stopping == WHY
    for member in ("w0", "w1"):
        controller.handle(StepCommitted(member, 1, 2, 1.0, 0.5, 1, 0.0, is_last=True), 5.8)
    controller.handle(MemberEnded("w0", 1, 2, Ending.STOPPED), 6.0)
    assert controller.handle(MemberEnded("w1", 1, 2, Ending.STOPPED), 6.0) == [End(Status.FAILED, WHY)]


def test_who_joins_in_shows_that_the_job_runs_elsewhere_and_two_more_may_raise() -> None:
    controller = stepping(2)
    controller.handle(WorkersWanted(3), 3.5)
    for member in ("w2", "w3"):
        controller.handle(raised(member, 0), 4.0)
    pass_time(controller, 4.0, 5.5)
    controller.handle(MemberReady("w4", "h", 9), 5.6)
    tell_all(controller, "w0", "w1", "w4", at=5.7)
    controller.handle(WorkersWanted(4), 5.8)
    for member in ("w5", "w6"):
        controller.handle(raised(member, 0), 6.0)
        pass_time(controller, 6.0, 7.5)
    assert controller.stopping is None
    controller.handle(raised("w7", 0), 8.0)
    assert controller.stopping == WHY


def test_a_replacement_that_raises_while_nobody_is_left_is_not_the_end_of_the_run() -> None:
    controller = stepping(1)
    controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 4.0)
    killed, started = controller.handle(raised("w1", 0), 5.0)
    assert isinstance(killed, KillMember) and started == StartMember("w2")


def test_an_earlier_drivers_member_that_raised_saves_what_it_holds() -> None:
    controller = Controller(WorldPolicy(workers=1), "w7.", generation=7)
    controller.begin(["w0"], 0.0)
    assert controller.handle(raised("w0", 17), 0.2) == []
    last = last_world(controller.handle(MemberReady("w0", "h", 1, 17), 0.5))
    assert last.members == ("w0",)


def test_an_earlier_drivers_newcomer_that_raises_in_its_dataset_is_replaced_and_the_others_go_on() -> None:
    controller = Controller(WorldPolicy(workers=3), "w9.", generation=9)
    controller.begin(["w0", "w1", "w2"], 0.0)
    for member in ("w0", "w1"):
        controller.handle(MemberReady(member, "h", 1, 50, 9), 0.1)
    (formed,) = controller.handle(MemberBuilding("w2"), 0.2)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w1")
    killed, _ = controller.handle(raised("w2", 0), 0.3)
    assert isinstance(killed, KillMember) and killed.member == "w2"
    assert controller.stopping is None
