"""Micro-batches that take long: who is stuck in one is ended, slow data is nobody's hang, and is learned."""

import pytest

from elastic.control.controller import Controller
from elastic.control.events import MemberCame, MemberReady, StepCommitted, Tick, UserFailed, WorkersWanted
from elastic.control.instructions import FormWorld, Instruction, KillMember
from tests.controlled import pass_time, stepping, tell_all


def killed(told: list[Instruction]) -> list[str]:
    """Whom these instructions end."""
    return [one.member for one in told if isinstance(one, KillMember)]


def with_joiner_at_the_boundary(workers: int) -> Controller:
    """A controller whose world steps on, while a newcomer waits for it to come to a boundary."""
    controller = stepping(workers)
    controller.handle(WorkersWanted(workers + 1), 3.1)
    controller.handle(MemberReady(f"w{workers}", "h", 9), 3.2)
    controller.handle(MemberCame(f"w{workers}", 2), 3.3)
    return controller


@pytest.mark.parametrize("workers", [1, 3])
def test_a_joiner_that_waits_at_the_boundary_does_not_say_that_all_others_are_stuck(workers: int) -> None:
    controller = with_joiner_at_the_boundary(workers)
    everybody = dict.fromkeys(controller.members.hosts, 3.0)
    everybody.pop(f"w{workers}")
    assert pass_time(controller, 3.3, 800.0, working=everybody) == []


def test_who_is_stuck_while_others_wait_at_the_boundary_is_still_found() -> None:
    controller = with_joiner_at_the_boundary(3)
    assert killed(pass_time(controller, 3.3, 20.0, working={"w1": 3.3})) == ["w1"]


def test_a_joiner_in_its_first_micro_batch_does_not_say_that_all_others_are_stuck() -> None:
    controller = with_joiner_at_the_boundary(2)
    tell_all(controller, "w0", "w1", "w2", at=3.5)
    assert pass_time(controller, 3.5, 800.0, working={"w0": 3.5, "w1": 3.5}) == []


def test_a_standby_that_comes_at_once_does_not_say_that_the_survivors_are_stuck() -> None:
    controller = stepping(2)
    controller.handle(MemberReady("w2", "h", 9), 3.1)
    controller.handle(MemberReady("w3", "h", 9), 3.2)
    told = controller.handle(WorkersWanted(1), 3.3)
    assert any(isinstance(one, FormWorld) for one in told)
    assert pass_time(controller, 3.4, 300.0, working={"w0": 3.0, "w1": 3.0}) == []


def test_who_has_just_died_does_not_say_that_the_others_are_stuck() -> None:
    controller = stepping(3)
    working = {"w0": 3.0, "w1": 3.0, "w2": 3.0}
    assert pass_time(controller, 3.0, 20.0, working=working) == []
    left = {"w0": 17.0, "w1": 17.0}
    assert controller.handle(Tick(dict.fromkeys(left, 0.1), left), 20.1) == []


def test_who_raised_and_left_its_micro_batch_does_not_say_that_the_others_are_stuck() -> None:
    controller = stepping(3)
    controller.handle(UserFailed("w2", 0, 1, "ValueError: bad sample", ""), 4.0)
    controller.handle(MemberCame("w2", controller.formed), 4.1)
    assert pass_time(controller, 4.1, 60.0, working={"w0": 3.0, "w1": 3.0}) == []


def test_slow_data_costs_one_worker_at_most_and_is_waited_for_longer_then() -> None:
    controller = stepping()
    (first, *_) = pass_time(controller, 3.0, 20.0, working={"w0": 3.0})
    assert isinstance(first, KillMember) and first.member == "w0"
    assert "a micro-batch of step 1 for 5 s" in first.reason
    tell_all(controller, "w1", "w2", at=8.5)
    pass_time(controller, 8.5, 11.0)  # a replacement is started
    assert pass_time(controller, 11.0, 27.0, working={"w1": 8.5}) == []


def test_each_verdict_of_one_step_makes_the_next_four_times_as_patient() -> None:
    controller, now = stepping(4), 3.0
    patience_s = []
    for member in ("w0", "w1"):
        told: list[Instruction] = []
        since = now
        while member not in killed(told):
            told = pass_time(controller, now, now + 30.0, working={member: since})
            now = round(now + 0.1, 3) if told else now + 30.0
            assert now < 900.0
        patience_s.append(controller.diagnosis.work_limit_s)
        now += 60.0
        tell_all(controller, *controller.members.world, at=now)
    assert patience_s == [20.0, 80.0]
    for member in controller.members.world:
        controller.handle(StepCommitted(member, controller.formed, 2, 1.0, 0.5, 1, 0.0), now)
    assert controller.diagnosis.work_limit_s == 20.0


def test_a_step_that_is_redone_after_a_restore_has_the_patience_that_it_had() -> None:
    controller = stepping()
    assert killed(pass_time(controller, 3.0, 20.0, working={"w0": 3.0})) == ["w0"]
    tell_all(controller, "w1", "w2", at=8.5)
    generation = controller.formed
    for step in (1, 1):
        controller.handle(StepCommitted("w1", generation, step, 1.0, 0.5, 1, 0.0), 9.0)
    assert controller.diagnosis.work_limit_s == 20.0


def test_a_long_micro_batch_that_was_done_is_remembered_for_as_long_as_the_run_lasts() -> None:
    controller = stepping()
    everybody = dict.fromkeys(("w0", "w1", "w2"), 3.0)
    pass_time(controller, 3.0, 13.0, working=everybody)
    controller.handle(StepCommitted("w0", 1, 2, 1.0, 10.0, 1, 0.0), 13.1)
    pass_time(controller, 13.1, 16.0, working=dict.fromkeys(everybody, 13.1))
    for step in range(3, 103):
        pass_time(controller, 13.0 + step, 13.9 + step)
        controller.handle(StepCommitted("w0", 1, step, 1.0, 0.5, 1, 0.0), 13.9 + step)
    assert controller.diagnosis.work_limit_s > 39.0


def test_the_roll_is_not_called_while_somebody_is_at_a_micro_batch_that_may_still_be_done() -> None:
    controller = stepping()
    everybody = dict.fromkeys(("w0", "w1", "w2"), 3.0)
    pass_time(controller, 3.0, 43.0, working=everybody)
    controller.handle(StepCommitted("w0", 1, 2, 1.0, 0.5, 1, 0.0), 43.1)
    assert pass_time(controller, 43.1, 103.0, working={"w1": 43.1}) == []
