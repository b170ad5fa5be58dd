"""What takes long for a good reason is waited for: room in an arena, a restore, shards on their way."""

from collections.abc import Collection
from dataclasses import replace

from elastic.control.attendance import Stage
from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Ending,
    MemberCame,
    MemberEnded,
    MemberLeaving,
    MemberLost,
    MemberReady,
    Settled,
    StepCommitted,
    StopRequested,
    Tick,
    WorkersWanted,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import End, FormWorld, Instruction, KillMember, Manner, StopWorld
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy
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


def lost(controller: Controller, at: float) -> None:
    """Lose all members at once."""
    for member in tuple(controller.members.world):
        controller.handle(MemberLost(member, Cause.HOST_DIED, "its node pool is gone"), at)


def test_where_nobody_is_left_replacements_are_waited_for_as_long_as_where_somebody_is() -> None:
    controller = stepping()
    controller.policy = replace(controller.policy, wait_s=3600.0)
    lost(controller, 4.0)
    told = pass_time(controller, 4.0, 10.0) + pass_time(controller, 10.0, 500.0)
    assert not any(isinstance(one, End) for one in told)
    ends: list[End] = []
    now = 500.0
    while not ends and now < 5000.0:
        now += 0.9
        ends = [one for one in controller.handle(Tick(), now) if isinstance(one, End)]
    assert now > 3600.0 and ends and "within 3600 s" in ends[0].reason


def test_where_nobody_is_left_as_many_as_are_needed_go_on_once_the_time_to_gather_is_over() -> None:
    controller = stepping()
    controller.policy = replace(controller.policy, wait_s=3600.0)
    lost(controller, 4.0)
    assert pass_time(controller, 4.0, 10.0) == []
    assert controller.handle(MemberReady("w3", "h", 4), 10.0) == []
    (formed,) = pass_time(controller, 10.0, 130.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w3",)


def test_a_new_driver_of_a_run_that_had_a_world_waits_for_workers_as_long_as_for_replacements() -> None:
    controller = Controller(WorldPolicy(workers=2, wait_s=3600.0), "w7.", generation=7)
    controller.begin((), 0.0)
    assert pass_time(controller, 0.0, 500.0) == []


def test_where_all_machines_were_taken_away_their_loss_does_not_shorten_the_wait() -> None:
    controller = stepping(2)
    controller.policy = replace(controller.policy, wait_s=3600.0)
    for member in ("w0", "w1"):
        controller.handle(MemberLeaving(member, "drained"), 4.0)
    for member in ("w0", "w1"):
        controller.handle(MemberEnded(member, controller.formed, 1, Ending.STOPPED), 5.0)
    for member in ("w0", "w1"):
        controller.handle(MemberLost(member, Cause.HOST_DIED, "taken away"), 30.0)
    told = pass_time(controller, 30.0, 500.0)
    assert not any(isinstance(one, End) for one in told)


def gathering(answering: Collection[str]) -> Controller:
    """A controller of two members that are up, or not, for as long as one may take to start."""
    controller = Controller(WorldPolicy(workers=2), "w")
    controller.begin((), 0.0)
    for number in range(1, 5990):
        now = 0.1 * number
        silence_s = {one: 0.1 if one in answering else now for one in ("w0", "w1")}
        if told := controller.handle(Tick(silence_s), now):
            (end,) = told
            assert isinstance(end, End) and "within 120 s; give the cluster more resources" in end.reason
            break
    return controller


def test_who_is_up_and_makes_its_dataset_may_take_as_long_as_a_start_may_before_there_is_a_world() -> None:
    controller = gathering({"w0", "w1"})
    assert controller.phase is Phase.GATHERING
    told = [
        one for n in range(20) for one in controller.handle(Tick({"w0": 0.1, "w1": 0.1}), 599.0 + 0.1 * n)
    ]
    (end,) = (one for one in told if isinstance(one, End))
    assert "w0, w1 still make their dataset or model" in end.reason


def test_who_has_no_place_to_start_is_waited_for_as_long_as_a_world_gathers() -> None:
    assert gathering(()).phase is Phase.ENDED


def test_as_many_standbys_as_suffice_follow_a_wish_for_more_workers() -> None:
    for standbys_follow, standbys in ((True, 9), (False, 1)):
        controller = stepping(4)
        controller.policy = replace(controller.policy, standbys=1, standbys_follow=standbys_follow)
        controller.handle(WorkersWanted(1000), 4.0)
        assert controller.policy.standbys == standbys
