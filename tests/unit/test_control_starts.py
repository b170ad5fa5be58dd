"""When processes start: one that fails to costs a world that trains nothing but a pause before the next."""

from elastic.control.controller import Controller
from elastic.control.events import Cause, MemberLost, MemberReady, Settled, StepCommitted, WorkersWanted
from elastic.control.instructions import FormWorld, Instruction, ReleaseMember, StartMember
from elastic.control.policy import WorldPolicy
from elastic.control.starts import LONGEST_PAUSE_S, Starts
from tests.controlled import stepping


def started(told: list[Instruction]) -> list[str]:
    """Whom these instructions start."""
    return [one.member for one in told if isinstance(one, StartMember)]


def test_however_many_starts_fail_beside_a_world_that_trains_it_goes_on() -> None:
    controller, step = stepping(2), 1
    (starting,) = started(controller.handle(WorkersWanted(3), 4.0))
    for _ in range(150):
        told = controller.handle(MemberLost(starting, Cause.START_FAILED, "no image"), 4.0 + step)
        while not started(told):
            step += 1
            told = controller.handle(StepCommitted("w0", 1, step, 1.0, 1.0, 1, 0.0), 4.0 + step)
        (only,) = told
        assert isinstance(only, StartMember)
        starting = only.member
    assert step > 100 * LONGEST_PAUSE_S
    assert controller.members.world == ("w0", "w1")
    assert controller.losses.num == 0


def test_pauses_between_starts_that_fail_grow_to_a_minute_and_end_with_one_that_does_not() -> None:
    starts, now, pauses_s = Starts(), 0.0, []
    for _ in range(12):
        starts.fail(now)
        began = now
        while not starts.may_begin(now):
            now += 0.5
        pauses_s.append(now - began)
    assert pauses_s[:5] == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert pauses_s[-1] == LONGEST_PAUSE_S
    starts.fail(now)
    starts.succeed()
    assert starts.may_begin(now)


def test_a_world_without_state_to_go_on_from_starts_the_next_worker_at_once() -> None:
    controller = Controller(WorldPolicy(workers=2), "w")
    assert len(controller.begin((), 0.0)) == 2
    for number in range(3):
        lost = MemberLost(f"w{number}", Cause.START_FAILED, "no room")
        assert started(controller.handle(lost, 1.0)) == [f"w{number + 2}"]


def test_a_smaller_world_keeps_its_warm_standby_and_ends_whom_it_leaves() -> None:
    controller = stepping(3)
    controller.policy = WorldPolicy(workers=3, standbys=1)
    controller.handle(MemberReady("w3", "h", 1), 3.5)
    (formed,) = controller.handle(WorkersWanted(2), 4.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w1")
    controller.handle(Settled("w0", formed.generation, 1, "self", 0.1), 4.5)
    told = controller.handle(Settled("w1", formed.generation, 1, "self", 0.1), 4.5)
    told += controller.handle(StepCommitted("w0", formed.generation, 2, 1.0, 0.5, 1, 0.0), 5.0)
    assert [one.member for one in told if isinstance(one, ReleaseMember)] == ["w2"]
    assert started(told) == []
