"""Hangs in any phase: the one that hangs is named and ended, who waits for it is not, the others go on."""

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
    WorkersWanted,
)
from elastic.control.instructions import (
    End,
    FormWorld,
    KillMember,
    Manner,
    StartMember,
    Status,
    StopWorld,
)
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy
from tests.controlled import pass_time, stepping, tell_all, training


def test_where_nothing_moves_the_roll_is_called_and_who_does_not_come_is_ended() -> None:
    controller = stepping()
    (roll,) = pass_time(controller, 3.0, 20.0)
    assert isinstance(roll, FormWorld)
    assert (roll.members, roll.manner) == (("w0", "w1", "w2"), Manner.AT_ONCE)
    for member in ("w0", "w2"):
        controller.handle(MemberCame(member, 2), 13.5)
    killed, formed = pass_time(controller, 13.5, 90.0)
    assert isinstance(killed, KillMember)
    assert (killed.member, killed.cause) == ("w1", Cause.HUNG)
    assert "has not come to the new world" in killed.reason
    assert isinstance(formed, FormWorld)
    assert formed.members == ("w0", "w2")


def test_a_roll_that_all_answer_costs_nobody_and_is_forgotten_with_the_next_step() -> None:
    controller = stepping()
    pass_time(controller, 3.0, 20.0)
    tell_all(controller, "w0", "w1", "w2", at=13.6)
    assert controller.phase is Phase.TRAINING
    assert controller.diagnosis.num_stalls == 1
    controller.handle(StepCommitted("w0", 2, 2, 1.0, 0.5, 1, 0.0), 14.0)
    assert controller.diagnosis.num_stalls == 0


def test_who_never_made_a_step_gets_longer_to_come_as_its_first_may_compile() -> None:
    controller = stepping(2)
    controller.handle(WorkersWanted(3), 3.1)
    controller.handle(MemberReady("w2", "h", 2), 3.2)
    tell_all(controller, "w0", "w1", "w2", at=3.3)
    (roll,) = pass_time(controller, 3.3, 20.0)
    assert isinstance(roll, FormWorld) and roll.manner is Manner.AT_ONCE
    for member in ("w0", "w1"):
        controller.handle(MemberCame(member, 3), 14.0)
    assert pass_time(controller, 14.0, 800.0) == []
    killed, *_ = pass_time(controller, 800.0, 1000.0)
    assert isinstance(killed, KillMember) and killed.member == "w2"


def test_where_only_an_idle_newcomer_comes_nobody_is_blamed_for_what_holds_all_others_up() -> None:
    controller = stepping(2)
    controller.handle(WorkersWanted(3), 3.1)
    (boundary,) = controller.handle(MemberReady("w2", "h", 2), 3.2)
    assert isinstance(boundary, FormWorld) and boundary.manner is Manner.AT_BOUNDARY
    controller.handle(MemberCame("w2", 2), 3.3)
    (roll,) = pass_time(controller, 3.3, 20.0)
    assert isinstance(roll, FormWorld) and roll.manner is Manner.AT_ONCE
    controller.handle(MemberCame("w2", 3), 14.0)
    assert pass_time(controller, 14.0, 800.0) == []


def test_who_hangs_as_it_settles_is_found_by_the_roll_once_that_takes_far_longer_than_it_did() -> None:
    controller = stepping()
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 3.5)
    tell_all(controller, "w0", "w1", at=3.6)
    controller.handle(StepCommitted("w0", 2, 2, 1.0, 0.5, 1, 0.0), 4.0)
    controller.handle(MemberReady("w3", "h", 3), 4.5)
    tell_all(controller, "w0", "w1", "w3", at=4.6)
    controller.handle(StepCommitted("w0", 3, 3, 1.0, 0.5, 1, 0.0), 5.0)
    controller.handle(MemberLost("w3", Cause.PROCESS_DIED, ""), 5.1)
    tell_all(controller, "w0", "w1", at=5.2, settle=False)
    assert pass_time(controller, 5.2, 9.0) == [StartMember("w4")]
    (roll,) = pass_time(controller, 9.0, 20.0)
    assert isinstance(roll, FormWorld) and roll.members == ("w0", "w1")
    controller.handle(MemberCame("w0", 5), 16.0)
    killed, *_ = pass_time(controller, 16.0, 90.0)
    assert isinstance(killed, KillMember) and killed.member == "w1"


def test_a_message_that_got_lost_holds_nobody_up_because_later_ones_say_the_same() -> None:
    controller = stepping()
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 3.5)
    controller.handle(Settled("w0", 2, 1, "self", 0.1), 3.6)
    assert controller.roll.stage is Stage.SETTLING
    assert controller.handle(StepCommitted("w0", 2, 2, 1.0, 0.5, 1, 0.0), 4.0) == [StartMember("w3")]
    assert controller.phase is Phase.TRAINING


def test_a_last_checkpoint_that_never_becomes_durable_is_asked_for_again() -> None:
    controller = stepping(2)
    controller.handle(MemberEnded("w0", 1, 1, Ending.FINISHED), 4.0)
    assert pass_time(controller, 4.0, 600.0) == []
    (roll,) = pass_time(controller, 600.0, 700.0)
    assert isinstance(roll, FormWorld) and roll.manner is Manner.AT_ONCE


def test_a_process_that_answers_nobody_is_ended_though_the_others_make_steps() -> None:
    controller = stepping(2)
    for step in range(2, 60):
        now = 3.0 + step
        controller.handle(StepCommitted("w0", 1, step, 1.0, 0.5, 1, 0.0), now)
        decided = pass_time(controller, now, now + 0.9, silent={"w1": 5.0})
        if decided:
            assert isinstance(decided[0], KillMember) and decided[0].member == "w1"
            assert now - 5.0 > 29.0
            return
    raise AssertionError("it was silent for ever")


def test_all_that_hold_the_state_are_not_ended_at_once_for_a_silence_though_others_answer() -> None:
    controller = stepping(2)
    controller.handle(MemberReady("w7", "h", 7), 3.5)
    since = {"w0": 4.0, "w1": 4.0}
    (roll,) = pass_time(controller, 4.0, 20.0, silent=since)
    assert isinstance(roll, FormWorld) and roll.members == ("w0", "w1")
    assert pass_time(controller, 13.0, 33.0, silent=since) == []
    killed, *_ = pass_time(controller, 33.0, 40.0, silent=since)
    assert isinstance(killed, KillMember) and "has not answered for 30 s" in killed.reason


def test_the_only_holder_of_the_state_is_not_ended_for_a_short_silence_beside_a_newcomer() -> None:
    controller = stepping(2)
    controller.handle(MemberReady("w2", "h", 2), 3.0)
    *_, formed = controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 4.0)
    assert isinstance(formed, FormWorld | StartMember) and controller.members.world == ("w0", "w2")
    told = pass_time(controller, 4.0, 12.0, silent={"w0": 4.0})
    assert not any(isinstance(one, KillMember) for one in told)


def test_who_is_silent_on_the_way_to_a_boundary_has_the_time_of_steps_that_the_world_still_makes() -> None:
    controller = training(3)
    for member in ("w0", "w1", "w2"):
        controller.handle(StepCommitted(member, 1, 1, 1.0, 30.0, 1, 0.0), 3.0)
    told = controller.handle(MemberLeaving("w2", "drained"), 4.0)
    assert any(isinstance(one, FormWorld) and one.manner is Manner.AT_BOUNDARY for one in told)
    assert pass_time(controller, 4.0, 12.0, silent={"w1": 4.0}) == []


def test_who_is_in_a_long_micro_batch_has_the_time_to_end_it_before_it_comes() -> None:
    controller = stepping()
    pass_time(controller, 3.0, 68.0, working=dict.fromkeys(("w0", "w1", "w2"), 3.0))
    pass_time(controller, 68.0, 69.0)  # micro-batches of 65 s
    controller.handle(StepCommitted("w0", 1, 2, 1.0, 65.0, 1, 0.0), 69.0)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 70.0)
    controller.handle(MemberCame("w0", controller.formed), 71.0)
    told = pass_time(controller, 71.0, 140.0, working={"w1": 70.0})
    assert not any(isinstance(one, KillMember) for one in told)


def test_a_driver_that_slept_blames_nobody_for_what_it_did_not_hear() -> None:
    controller = stepping()
    assert pass_time(controller, 3.0, 5.0) == []
    slept = {"w0": 5.0, "w1": 5.0, "w2": 5.0}
    assert pass_time(controller, 1200.0, 1200.2, silent=slept) == []
    controller.handle(StepCommitted("w0", 1, 2, 1.0, 0.5, 1, 0.0), 1200.3)
    killed, *_ = pass_time(controller, 1200.3, 1210.0, silent={"w1": 5.0})
    assert isinstance(killed, KillMember) and killed.member == "w1"


def test_an_earlier_drivers_member_that_never_answers_is_replaced_and_the_others_go_on_at_once() -> None:
    controller = Controller(WorldPolicy(workers=3), "w7.", generation=7)
    assert controller.begin(["w0", "w1", "w2"], 0.0) == []
    for member in ("w0", "w2"):
        assert controller.handle(MemberReady(member, "h", 1, generation=7), 0.5) == []
    killed, started, formed = pass_time(controller, 0.5, 40.0)
    assert isinstance(killed, KillMember)
    assert (killed.member, killed.cause, started) == ("w1", Cause.START_FAILED, StartMember("w7.0"))
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w2")
    assert controller.losses.num == 0


def test_a_worker_that_never_starts_is_replaced_and_is_no_failure() -> None:
    controller = stepping(2)
    assert controller.handle(WorkersWanted(3), 3.5) == [StartMember("w2")]
    for step in range(2, 100):
        now = 10.0 * step
        controller.handle(StepCommitted("w0", 1, step, 1.0, 0.5, 1, 0.0), now)
        decided = pass_time(controller, now, now + 9.9)
        if decided:
            killed, started = decided
            assert isinstance(killed, KillMember) and killed.cause is Cause.START_FAILED
            assert started == StartMember("w3")
            assert controller.losses.num == 0
            return
    raise AssertionError("it was waited for for ever")


def test_all_members_of_an_earlier_driver_are_in_the_first_world_as_any_may_hold_the_state() -> None:
    controller = Controller(WorldPolicy(workers=2), "w7.", generation=7)
    controller.begin(["w0", "w1", "w2"], 0.0)
    controller.handle(MemberReady("w0", "h", 1, generation=7), 0.5)
    controller.handle(MemberReady("w1", "h", 1, generation=7), 0.5)
    (formed,) = controller.handle(MemberReady("w2", "h", 1, generation=7), 0.5)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w1", "w2")


def test_where_all_will_be_taken_away_they_save_at_the_next_boundary_and_newcomers_go_on_from_there() -> None:
    controller = stepping(2)
    controller.handle(MemberLeaving("w0", "drained"), 4.0)
    controller.handle(MemberLeaving("w1", "drained"), 4.1)
    *_, stop = controller.handle(Settled("w1", 2, 1, "self", 0.1), 4.2)
    assert stop == StopWorld(controller.formed, "all workers that hold the state will be taken away")
    for member in controller.members.world:
        decided = controller.handle(MemberEnded(member, controller.formed, 2, Ending.STOPPED), 5.0)
        assert not any(isinstance(each, End | FormWorld) for each in decided)
    assert controller.phase is Phase.GATHERING
    assert controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 6.0) == []
    assert controller.losses.num == 0
    (formed,) = controller.handle(MemberReady("w2", "h", 3), 7.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w2",)
    tell_all(controller, "w2", at=7.5)
    (larger,) = controller.handle(MemberReady("w3", "h", 3), 8.0)
    assert isinstance(larger, FormWorld) and larger.members == ("w2", "w3")


def test_where_all_will_be_taken_away_and_the_world_broke_the_rest_forms_once_more_to_save() -> None:
    controller = stepping(2)
    controller.handle(MemberLeaving("w0", "drained"), 4.0)
    controller.handle(MemberLeaving("w1", "drained"), 4.1)
    formed = controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 4.2)[0]
    assert isinstance(formed, FormWorld) and formed.members == ("w0",), (
        "it holds the state, though it had left"
    )
    assert formed.only_saves
    controller.handle(Settled("w0", formed.generation, 1, "self", 0.1), 4.3)
    controller.handle(MemberEnded("w0", formed.generation, 1, Ending.STOPPED), 4.4)
    (end,) = pass_time(controller, 4.4, 400.0)
    assert isinstance(end, End) and end.status is Status.FAILED
    assert "came within 300 s" in end.reason


def test_a_newcomer_that_is_there_before_the_last_holder_has_saved_gets_its_state() -> None:
    controller = stepping(1)
    started, stop = controller.handle(MemberLeaving("w0", "drained"), 4.0)
    assert started == StartMember("w1")
    assert stop == StopWorld(1, "all workers that hold the state will be taken away")
    (both,) = controller.handle(MemberReady("w1", "h", 2), 5.0)
    assert isinstance(both, FormWorld) and both.members == ("w0", "w1")


def test_where_all_holders_will_be_taken_away_a_standby_gets_the_state_though_a_world_wants_more() -> None:
    controller = Controller(WorldPolicy(workers=2, min_workers=2, standbys=1), "w")
    controller.begin((), 0.0)
    for index in range(3):
        controller.handle(MemberReady(f"w{index}", "h", index), 1.0)
    for member in controller.members.world:
        controller.handle(Settled(member, controller.formed, 0, "fresh", 0.1), 2.0)
    controller.handle(MemberLeaving("w0", "drained"), 3.0)
    for member in controller.members.world:
        controller.handle(Settled(member, controller.formed, 0, "self", 0.1), 4.0)
    holders = controller.members.world
    told = [one for member in holders for one in controller.handle(MemberLeaving(member, "drained"), 5.0)]
    assert any(isinstance(one, FormWorld | StopWorld) for one in told)


def test_a_stop_while_all_wait_for_newcomers_ends_the_run() -> None:
    controller = stepping(1)
    controller.handle(MemberLeaving("w0", "drained"), 4.0)
    controller.handle(MemberEnded("w0", 1, 2, Ending.STOPPED), 4.5)
    assert controller.handle(StopRequested("test"), 5.0) == [End(Status.STOPPED, "test")]


def test_a_world_that_stops_because_a_worker_lost_its_driver_is_no_end_of_the_run() -> None:
    controller = stepping(2)
    controller.handle(MemberEnded("w0", 1, 2, Ending.STOPPED), 4.0)
    (formed,) = controller.handle(MemberEnded("w1", 1, 2, Ending.STOPPED), 4.1)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w1")


def test_a_smaller_world_that_was_asked_for_lowers_the_least_only_as_long_as_it_is_wanted() -> None:
    controller = Controller(WorldPolicy(workers=4, min_workers=3), "w")
    controller.begin((), 0.0)
    controller.handle(WorkersWanted(1), 0.1)
    assert controller.policy.min_workers == 1
    controller.handle(WorkersWanted(5), 0.2)
    assert (controller.policy.workers, controller.policy.min_workers) == (5, 3)
