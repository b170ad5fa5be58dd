"""What takes long for a good reason is waited for: room in an arena, a restore, shards on their way."""

from elastic.control.attendance import Stage
from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    MemberCame,
    MemberLost,
    Settled,
    StepCommitted,
    StopRequested,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import FormWorld, Instruction, KillMember, Manner, StopWorld
from elastic.control.phase import Phase
from tests.controlled import pass_time, stepping, tell_all

ALL = ("w0", "w1", "w2")


def killed(told: list[Instruction]) -> list[str]:
    """Whom these instructions end."""
    return [one.member for one in told if isinstance(one, KillMember)]


def broken_blank(controller: Controller, at: float) -> FormWorld:
    """Let all members give their state up, and the next world be ordered."""
    for member in ALL:
        controller.handle(WorldBroken(member, controller.formed, "the state is lost", True), at)
    (formed,) = pass_time(controller, at, at + 5.0)
    assert isinstance(formed, FormWorld) and formed.members == ALL
    return formed


def test_who_waits_for_room_in_its_arena_is_waited_for_though_the_others_wait_for_it() -> None:
    controller = stepping()
    assert pass_time(controller, 3.0, 600.0, waiting={"w1"}) == []
    assert pass_time(controller, 600.0, 609.0) == [], "its time begins when there is room"
    controller.handle(StepCommitted("w0", 1, 2, 1.0, 600.0, 1, 0.0), 609.0)
    assert controller.phase is Phase.TRAINING


def test_who_hangs_once_there_was_room_is_found_as_if_it_had_not_waited() -> None:
    controller = stepping()
    assert pass_time(controller, 3.0, 300.0, waiting={"w1"}) == []
    (roll,) = pass_time(controller, 300.0, 320.0)
    assert isinstance(roll, FormWorld)
    for member in ("w0", "w2"):
        controller.handle(MemberCame(member, 2), 312.0)
    assert killed(pass_time(controller, 312.0, 380.0)) == ["w1"]


def test_who_waits_for_room_may_come_late_to_a_new_world_and_who_hangs_beside_it_is_found() -> None:
    controller = stepping(4)
    controller.handle(MemberLost("w3", Cause.PROCESS_DIED, ""), 4.0)
    controller.handle(MemberCame("w0", 2), 4.2)
    told = pass_time(controller, 4.2, 7.0, waiting={"w1"})  # the replacement is started
    told += pass_time(controller, 7.0, 80.0, waiting={"w1"})
    assert killed(told) == ["w2"], "it has no reason to be late"
    controller.handle(MemberCame("w0", controller.formed), 80.0)
    assert killed(pass_time(controller, 80.0, 400.0, waiting={"w1"})) == []
    controller.handle(MemberCame("w1", controller.formed), 400.5)
    assert controller.roll.stage is Stage.CONNECTING


def test_a_restore_after_the_state_was_lost_has_the_time_that_one_may_take() -> None:
    controller = stepping()
    formed = broken_blank(controller, 4.0)
    tell_all(controller, *ALL, at=6.0, settle=False)
    assert pass_time(controller, 6.0, 800.0) == []
    for member in ALL:
        controller.handle(Settled(member, formed.generation, 0, "store", 790.0), 801.0)
    assert controller.phase is Phase.TRAINING
    assert controller.roll.origin == "store"


def test_who_restores_may_end_that_before_it_comes_to_the_world_after() -> None:
    controller = stepping()
    broken_blank(controller, 4.0)
    tell_all(controller, *ALL, at=6.0, settle=False)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 10.0)
    controller.handle(MemberCame("w1", controller.formed), 10.1)
    told = pass_time(controller, 10.1, 13.0)
    told += pass_time(controller, 13.0, 500.0)
    assert killed(told) == []


def test_a_state_that_is_told_to_be_lost_after_the_next_world_was_ordered_is_known_to_be() -> None:
    controller = stepping()
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 4.0)
    assert controller.roll.origin == "survivors"
    controller.handle(WorldBroken("w0", 1, "the state is lost", True), 4.1)
    assert controller.roll.origin == "store"


def test_a_joiner_that_has_no_state_yet_says_nothing_of_the_others_state() -> None:
    controller = stepping()
    controller.handle(WorldBroken("w9", 1, "it never had any", True), 4.0)
    assert controller.members.heirs == ALL
    assert controller.members.origin == "self"


def test_shards_that_take_long_to_move_once_may_take_as_long_the_next_time() -> None:
    controller = stepping(4)
    controller.handle(MemberLost("w3", Cause.PROCESS_DIED, ""), 4.0)
    tell_all(controller, *ALL, at=4.5, settle=False)
    told = pass_time(controller, 4.5, 7.0)
    told += pass_time(controller, 7.0, 60.0)
    assert not any(isinstance(one, FormWorld) for one in told), "nobody knows yet how long it takes"
    for member in ALL:
        controller.handle(Settled(member, 2, 1, "self+peer", 55.0), 60.0)
    controller.handle(StepCommitted("w0", 2, 2, 1.0, 0.5, 1, 0.0), 61.0)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 62.0)
    for member in ("w0", "w1"):
        controller.handle(WorldFormed(member, 3, 0.1), 62.5)
    pass_time(controller, 62.5, 65.0)
    assert pass_time(controller, 65.0, 180.0) == []


def test_a_world_that_is_told_to_stop_has_a_steps_time_to_come_to_its_last_checkpoint() -> None:
    controller = stepping()
    assert controller.handle(StopRequested("test"), 4.0) == [StopWorld(1, "test")]
    (roll,) = pass_time(controller, 4.0, 20.0)
    assert isinstance(roll, FormWorld) and roll.manner is Manner.AT_ONCE
    for member in ("w0", "w2"):
        controller.handle(MemberCame(member, 2), 15.0)
    assert killed(pass_time(controller, 15.0, 90.0)) == ["w1"]


def test_the_last_checkpoint_of_a_world_that_was_told_to_stop_has_all_its_time() -> None:
    controller = stepping()
    controller.handle(StopRequested("test"), 4.0)
    controller.handle(StepCommitted("w0", 1, 2, 1.0, 0.5, 1, 0.0, is_last=True), 4.5)
    assert controller.roll.stage is Stage.ENDING
    assert pass_time(controller, 4.5, 600.0) == []
