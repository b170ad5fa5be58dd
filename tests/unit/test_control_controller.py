"""The controller, case by case: what an earlier driver left, names, late stops, worlds that cannot form."""

from dataclasses import replace

from elastic.control.attendance import Stage
from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Ending,
    MemberEnded,
    MemberFailed,
    MemberLeaving,
    MemberLost,
    MemberReady,
    Settled,
    StepCommitted,
    StopRequested,
    Tick,
    UserFailed,
    WorkersWanted,
    WorldBroken,
)
from elastic.control.instructions import (
    End,
    FormWorld,
    Instruction,
    KillMember,
    Manner,
    ReleaseMember,
    StartMember,
    Status,
    StopWorld,
)
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy
from tests.controlled import pass_time, training


def test_what_members_still_tell_of_an_earlier_drivers_world_neither_ends_nor_starts_anything() -> None:
    controller = Controller(WorldPolicy(workers=2), "w7.", generation=7)
    controller.begin(["w0", "w1"], 0.0)
    assert controller.handle(Settled("w0", 7, 10, "self", 0.1), 0.1) == []
    assert controller.handle(StepCommitted("w0", 7, 11, 1.0, 0.5, 1, 0.0), 0.2) == []
    assert controller.handle(MemberEnded("w0", 7, 11, Ending.STOPPED), 0.3) == []
    assert controller.phase is Phase.GATHERING
    controller.handle(MemberReady("w0", "h", 1), 0.4)
    (formed,) = controller.handle(MemberReady("w1", "h", 2), 0.5)
    assert isinstance(formed, FormWorld)
    assert formed.generation == 8


def test_a_new_member_never_gets_the_name_of_one_that_an_earlier_driver_left() -> None:
    controller = Controller(WorldPolicy(workers=4), "w")
    started = controller.begin(["w0", "w2", "w3"], 0.0)
    assert started == [StartMember("w1")]


def test_a_stop_before_the_found_workers_said_hello_still_saves_their_state() -> None:
    controller = Controller(WorldPolicy(workers=3), "w5.", generation=5)
    controller.begin(["w0", "w1"], 0.0)
    assert controller.handle(StopRequested("test"), 0.1) == []
    controller.handle(MemberReady("w0", "h", 1, generation=5), 0.2)
    (formed,) = controller.handle(MemberReady("w1", "h", 2, generation=5), 0.3)
    assert isinstance(formed, FormWorld)
    assert (formed.members, formed.only_saves) == (("w0", "w1"), True)
    controller.handle(Settled("w0", 6, 9, "self", 0.1), 0.4)
    assert controller.handle(Settled("w1", 6, 9, "self", 0.1), 0.4) == [], "it saves and ends as it is"
    assert controller.roll.stage is Stage.ENDING


def test_a_stop_without_any_worker_that_holds_state_ends_at_once() -> None:
    controller = Controller(WorldPolicy(workers=2), "w")
    controller.begin((), 0.0)
    controller.handle(MemberReady("w0", "h", 1), 0.2)
    (end,) = controller.handle(StopRequested("test"), 0.3)
    assert isinstance(end, End)
    assert end.status is Status.STOPPED


def test_a_world_that_breaks_again_and_again_though_nobody_is_lost_ends_the_run_with_its_reason() -> None:
    controller, now = training(), 2.0
    for _ in range(5 * 600):
        now += 0.2
        controller.handle(WorldBroken("w0", controller.generation, "port 7 is blocked"), now)
        for instruction in controller.handle(Tick(), now):
            if isinstance(instruction, End):
                assert instruction.status is Status.FAILED
                assert "port 7 is blocked" in instruction.reason
                assert now > 300.0, "what blocks it may have passed by then"
                return
    raise AssertionError("it went on for ever")


def test_a_joiner_that_cannot_start_is_replaced_and_the_others_train_on() -> None:
    controller = training(workers=3)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, "test"), 3.0)
    for member in ("w0", "w1"):
        controller.handle(Settled(member, 2, 5, "self", 0.1), 3.5)
    assert controller.handle(StepCommitted("w0", 2, 6, 1.0, 0.1, 1, 0.0), 3.8) == [StartMember("w3")]
    told = controller.handle(MemberFailed("w3", "OSError: no room"), 4.0)
    assert told == [KillMember("w3", "OSError: no room", Cause.FAILED), StartMember("w4")]
    assert controller.phase is Phase.TRAINING


def test_a_mistake_in_the_job_ends_the_run_in_the_workers_own_words() -> None:
    (end,) = training().handle(UserFailed("w0", 1, 4, "the job failed in step 4: no", ""), 5.0)
    assert end == End(Status.FAILED, "the job failed in step 4: no")


def test_a_rank_that_hangs_after_the_others_have_ended_is_found() -> None:
    controller = training()
    controller.handle(StepCommitted("w0", 1, 1, 1.0, 0.5, 1, 0.0), 3.0)
    controller.handle(MemberEnded("w0", 1, 1, Ending.FINISHED), 4.0)
    told = pass_time(controller, 4.0, 60.0, silent={"w1": 4.0})
    assert isinstance(told[0], KillMember)
    assert told[-1] == End(Status.FINISHED, "all steps are committed and durable")


def test_a_slow_last_checkpoint_is_no_hang() -> None:
    controller = training()
    controller.roll.last_step = 1
    controller.handle(StepCommitted("w0", 1, 1, 1.0, 0.5, 1, 0.0), 3.0)
    assert pass_time(controller, 4.0, 500.0) == []


def test_how_long_a_member_takes_to_start_says_nothing_about_how_long_members_are_silent() -> None:
    controller = training()
    controller.handle(StepCommitted("w0", 1, 1, 1.0, 0.1, 1, 0.0), 3.0)
    assert pass_time(controller, 3.0, 4.0, silent={"w2": -100.0}) == []
    killed, *_ = pass_time(controller, 4.0, 9.0, silent={"w1": 4.0})
    assert isinstance(killed, KillMember)
    assert killed.member == "w1"


def test_a_member_that_will_be_taken_away_leaves_at_a_step_boundary_and_is_no_failure() -> None:
    controller = training(3)
    started, formed = controller.handle(MemberLeaving("w1", "drained"), 3.0)
    assert started == StartMember("w3")
    assert isinstance(formed, FormWorld)
    assert (formed.members, formed.manner) == (("w0", "w2"), Manner.AT_BOUNDARY)
    assert controller.handle(Settled("w0", 2, 1, "self", 0.1), 4.0) == []
    assert controller.handle(Settled("w2", 2, 1, "self", 0.1), 4.0) == [ReleaseMember("w1", "drained")]
    assert controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 4.1) == []
    assert controller.losses.num == 0


def test_the_only_holder_of_the_state_hands_it_to_its_replacement_before_it_leaves() -> None:
    controller = training(1)
    assert controller.handle(MemberLeaving("w0", "drained"), 3.0)[0] == StartMember("w1")
    (both,) = controller.handle(MemberReady("w1", "h", 2), 4.0)
    assert isinstance(both, FormWorld) and both.members == ("w0", "w1")
    controller.handle(Settled("w0", 2, 1, "self", 0.1), 5.0)
    (alone,) = controller.handle(Settled("w1", 2, 1, "peer", 0.1), 5.0)
    assert isinstance(alone, FormWorld) and alone.members == ("w1",)
    again, *_ = controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 5.1)
    assert isinstance(again, FormWorld)
    assert again.members == ("w0",), "it still holds the state, though it had left"


def test_who_leaves_stays_until_the_world_that_went_on_without_it_has_settled() -> None:
    controller = training(2)
    *_, alone = controller.handle(MemberLeaving("w0", "drained"), 3.0)
    assert isinstance(alone, FormWorld) and alone.members == ("w1",)  # which may be dead by now
    told = controller.handle(MemberLeaving("w2", "drained"), 3.5)  # its replacement, which starts
    assert not any(isinstance(one, ReleaseMember) and one.member == "w0" for one in told)
    settled = controller.handle(Settled("w1", 2, 1, "self", 0.1), 4.0)
    assert ReleaseMember("w0", "drained") in settled


def test_a_world_grows_and_shrinks_as_somebody_wants_it_to() -> None:
    controller = training(2)
    controller.most_ranks = 3
    assert controller.handle(WorkersWanted(70), 3.0) == [StartMember("w2")]
    (grown,) = controller.handle(MemberReady("w2", "h", 2), 4.0)
    assert isinstance(grown, FormWorld) and grown.members == ("w0", "w1", "w2")
    for member in grown.members:
        controller.handle(Settled(member, 2, 1, "self", 0.1), 5.0)
    (shrunk,) = controller.handle(WorkersWanted(1), 6.0)
    assert isinstance(shrunk, FormWorld) and shrunk.members == ("w0",)
    released = controller.handle(Settled("w0", 3, 2, "self", 0.1), 7.0)
    assert [one.member for one in released if isinstance(one, ReleaseMember)] == ["w1", "w2"]


def test_a_standby_takes_a_lost_members_place_at_once_and_another_one_is_started() -> None:
    controller = Controller(WorldPolicy(workers=2, standbys=1), "w")
    assert len(controller.begin((), 0.0)) == 3
    for index in range(3):
        controller.handle(MemberReady(f"w{index}", "h", index), 1.0)
    for member in ("w0", "w1"):
        controller.handle(Settled(member, 1, 0, "fresh", 0.1), 2.0)
    (formed,) = controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 3.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w1", "w2")
    assert controller.handle(StepCommitted("w1", 2, 6, 1.0, 0.1, 1, 0.0), 3.5) == [StartMember("w3")]


def test_a_replacement_starts_once_the_survivors_made_a_step_or_had_two_seconds_for_one() -> None:
    controller = training(3)
    (formed,) = controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 3.0)
    assert isinstance(formed, FormWorld)
    for member in ("w0", "w1"):
        assert controller.handle(Settled(member, 2, 5, "self", 0.1), 3.1) == []
    assert pass_time(controller, 3.1, 4.9) == []
    assert pass_time(controller, 4.9, 5.2) == [StartMember("w3")]
    assert controller.handle(StepCommitted("w0", 2, 6, 1.0, 0.1, 1, 0.0), 5.1) == []


def test_losses_that_come_quickly_one_after_another_do_not_keep_the_replacements_waiting() -> None:
    controller = training(4)
    controller.handle(MemberLost("w3", Cause.PROCESS_DIED, ""), 3.0)
    assert pass_time(controller, 3.0, 4.9) == []
    (formed,) = controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 4.9)
    assert isinstance(formed, FormWorld)
    assert pass_time(controller, 4.9, 5.2) == [StartMember("w4"), StartMember("w5")]


def test_where_too_few_survive_for_a_world_the_replacements_start_at_once() -> None:
    controller = training(3)
    controller.policy = replace(controller.policy, min_workers=2)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 3.0)
    started = controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 3.1)
    assert started == [StartMember("w3"), StartMember("w4")]


def test_a_member_that_answers_but_is_stuck_in_a_micro_batch_is_killed_while_others_wait_for_it() -> None:
    controller = training(3)
    controller.handle(StepCommitted("w0", 1, 1, 1.0, 0.5, 1, 0.0), 10.0)
    assert pass_time(controller, 10.0, 10.5, working=dict.fromkeys(("w0", "w1", "w2"), 10.0)) == []
    assert pass_time(controller, 10.5, 12.0, working={"w1": 10.0}) == []
    killed, *_ = pass_time(controller, 12.0, 19.0, working={"w1": 10.0})
    assert isinstance(killed, KillMember)
    assert "w1 is stuck in a micro-batch of step 1 for 5 s while others wait" in killed.reason


def test_nobody_hangs_as_long_as_everybody_is_held_up_alike() -> None:
    controller = training(2)
    controller.handle(StepCommitted("w0", 1, 1, 1.0, 0.5, 1, 0.0), 10.0)
    assert pass_time(controller, 10.0, 100.0, working={"w0": 10.0, "w1": 10.0}) == []


def test_a_released_member_that_says_hello_all_the_same_is_a_stranger() -> None:
    controller = training(1)
    controller.handle(WorkersWanted(2), 3.0)
    assert controller.handle(WorkersWanted(1), 3.1) == [ReleaseMember("w1", "1 workers are wanted")]
    assert controller.handle(MemberReady("w1", "h", 2), 3.2) == []
    assert not controller.members.knows("w1")


def test_a_stop_after_a_take_over_waits_a_short_while_only_for_whom_nobody_has_heard_of() -> None:
    controller = Controller(WorldPolicy(workers=3), "w7.", generation=7)
    controller.begin(["w0", "w1", "w2"], 0.0)
    for member in ("w0", "w2"):
        controller.handle(MemberReady(member, "h", 1, generation=7), 0.5)
    assert controller.handle(StopRequested("SIGINT"), 1.0) == []
    killed, formed = pass_time(controller, 1.0, 12.0)
    assert isinstance(killed, KillMember) and killed.member == "w1"
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w2")


def test_where_one_rank_is_all_there_can_be_its_state_goes_on_through_the_store() -> None:
    controller = Controller(WorldPolicy(workers=1), "w", most_ranks=1)
    controller.begin((), 0.0)
    controller.handle(MemberReady("w0", "h", 0), 1.0)
    controller.handle(Settled("w0", 1, 0, "fresh", 0.1), 2.0)
    started, stop = controller.handle(MemberLeaving("w0", "drained"), 3.0)
    assert started == StartMember("w1")
    assert isinstance(stop, StopWorld)
    assert controller.handle(MemberReady("w1", "h", 1), 3.5) == []
    released, formed = controller.handle(MemberEnded("w0", 1, 4, Ending.STOPPED), 4.0)
    assert released == ReleaseMember("w0", "drained")
    assert isinstance(formed, FormWorld) and formed.members == ("w1",)
    assert controller.roll.origin == "store"
    assert controller.handle(Settled("w1", 2, 4, "store", 0.1), 5.0) == []


def test_where_one_rank_is_all_there_can_be_a_broken_world_of_its_is_saved_before_it_is_passed_on() -> None:
    controller = Controller(WorldPolicy(workers=1, standbys=1), "w", most_ranks=1)
    controller.begin((), 0.0)
    for member in ("w0", "w1"):
        controller.handle(MemberReady(member, "h", 0), 1.0)
    controller.handle(Settled("w0", 1, 0, "fresh", 0.1), 2.0)
    controller.handle(WorldBroken("w0", 1, "test"), 3.0)
    controller.handle(MemberLeaving("w0", "drained"), 3.1)
    told = pass_time(controller, 3.1, 6.0)
    assert [one.members for one in told if isinstance(one, FormWorld)] == [("w0",)]


def test_a_run_that_lost_too_many_workers_ends_once_those_that_are_left_have_saved() -> None:
    controller = training(3)
    controller.policy = replace(controller.policy, max_failures=0)
    (formed,) = controller.handle(MemberLost("w1", Cause.PROCESS_DIED, "it was killed"), 3.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w2")
    assert controller.handle(Settled("w0", 2, 5, "self", 0.1), 3.5) == []
    assert controller.handle(Settled("w2", 2, 5, "self", 0.1), 3.5) == []
    (again,) = controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 4.0)
    assert isinstance(again, FormWorld) and again.members == ("w2",)
    assert formed.only_saves and again.only_saves, "one more step might kill them, too"
    controller.handle(Settled("w2", 3, 5, "self", 0.1), 4.5)
    (end,) = controller.handle(MemberEnded("w2", 3, 5, Ending.STOPPED), 5.0)
    why = "1 workers were lost, recovery.max_failures allows fewer: it was killed"
    assert end == End(Status.FAILED, why)


def test_a_run_that_lost_too_many_workers_and_all_of_its_state_ends_at_once() -> None:
    controller = training(1)
    controller.policy = replace(controller.policy, max_failures=0)
    (end,) = controller.handle(MemberLost("w0", Cause.PROCESS_DIED, "it was killed"), 3.0)
    assert isinstance(end, End) and end.status is Status.FAILED


def test_a_standby_that_is_one_loss_too_many_lets_the_world_save_at_its_next_boundary() -> None:
    controller = training(2)
    controller.policy = replace(controller.policy, max_failures=0, standbys=1)
    controller.handle(MemberReady("w2", "h", 1), 3.0)
    (stop,) = controller.handle(MemberLost("w2", Cause.PROCESS_DIED, "killed"), 3.5)
    assert isinstance(stop, StopWorld)


def test_where_too_few_are_left_and_none_comes_the_state_is_saved_before_the_run_ends() -> None:
    controller = training(4)
    controller.policy = replace(controller.policy, min_workers=2, wait_s=5.0)
    for member in ("w1", "w2", "w3"):
        controller.handle(MemberLost(member, Cause.PROCESS_DIED, ""), 3.0)
    (last,) = pass_time(controller, 3.0, 12.0)
    assert isinstance(last, FormWorld) and last.members == ("w0",)
    assert controller.handle(Settled("w0", last.generation, 5, "self", 0.1), 12.5) == []
    (end,) = controller.handle(MemberEnded("w0", last.generation, 5, Ending.STOPPED), 13.0)
    assert isinstance(end, End) and end.status is Status.FAILED
    assert "at least 2 workers" in end.reason


def test_where_worlds_get_nowhere_whoever_holds_the_state_may_save_it_before_the_run_ends() -> None:
    controller, now, told = training(), 2.0, list[Instruction]()
    while controller.phase is not Phase.ENDED:
        now += 0.2
        told += controller.handle(WorldBroken("w0", controller.formed, "port 7 is blocked"), now)
        told += controller.handle(Tick(), now)
    last, end = told[-2:]
    assert isinstance(last, FormWorld) and last.reason == "the survivors save the state and stop"
    assert isinstance(end, End) and end.status is Status.FAILED


def test_a_replacement_that_comes_while_those_that_leave_save_is_too_few_and_ends_nothing() -> None:
    controller = training(3)
    controller.policy = replace(controller.policy, min_workers=3)
    told = [one for member in ("w0", "w1", "w2") for one in controller.handle(left(member), 400.0)]
    assert isinstance(told[-1], StopWorld)
    assert controller.handle(MemberReady("w3", "h", 3), 401.0) == []
    ended = [controller.handle(MemberEnded(f"w{rank}", 1, 5, Ending.STOPPED), 402.0) for rank in range(3)]
    assert ended[:2] == [[], []]
    assert ended[2] == [ReleaseMember(f"w{rank}", "drained") for rank in range(3)]
    assert controller.phase is Phase.GATHERING


def test_that_a_member_gave_up_a_state_which_it_has_got_anew_since_is_no_news() -> None:
    controller = training(3)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 3.0)
    for member in ("w0", "w1"):
        controller.handle(Settled(member, 2, 5, "store", 0.1), 3.5)
    controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 4.0)
    controller.handle(WorldBroken("w0", 1, "told late", True), 4.1)
    assert controller.members.heirs == ("w0",)


def left(member: str) -> MemberLeaving:
    """Tell that a member will be taken away."""
    return MemberLeaving(member, "drained")
