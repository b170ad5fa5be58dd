"""What a new driver does with an earlier one's members, of which there are more than a world may have."""

from elastic.control.controller import Controller
from elastic.control.events import Cause, MemberBuilding, MemberLost, MemberReady, StopRequested, Tick
from elastic.control.instructions import End, FormWorld, Instruction
from elastic.control.policy import WorldPolicy
from elastic.control.standing import BLANK


def taken_up(steps: dict[str, int], *, most_ranks: int) -> tuple[Controller, list[Instruction]]:
    """A driver that found these members, at these steps; and what it does once all have answered."""
    policy = WorldPolicy(workers=min(2, most_ranks), standbys=1)
    controller = Controller(policy, "w7.", 7, most_ranks=most_ranks)
    controller.begin(steps, 0.0)
    told: list[Instruction] = []
    for member, step in steps.items():
        told = controller.handle(MemberReady(member, "h", 1, step), 0.5)
    return controller, told


def test_of_more_found_members_than_a_world_may_have_those_with_the_newest_state_are_in_it() -> None:
    _, (formed,) = taken_up({"w0": BLANK, "w1": 90, "w2": 97}, most_ranks=1)
    assert isinstance(formed, FormWorld) and formed.members == ("w2",)
    _, (formed,) = taken_up({"w0": BLANK, "w1": 97, "w2": 97}, most_ranks=2)
    assert isinstance(formed, FormWorld) and formed.members == ("w1", "w2"), "w0 was a standby"


def test_of_found_members_that_hold_nothing_yet_the_one_that_was_ordered_into_a_world_goes_on() -> None:
    controller = Controller(WorldPolicy(workers=1), "w7.", 7, most_ranks=1)
    controller.begin(["w0", "w1"], 0.0)
    controller.handle(MemberReady("w0", "h", 1), 0.5)
    (formed,) = controller.handle(MemberReady("w1", "h", 1, generation=6), 0.5)
    assert isinstance(formed, FormWorld) and formed.members == ("w1",), "it may make steps meanwhile"


def test_where_all_found_members_fit_into_one_world_none_is_left_out_of_it() -> None:
    _, (formed,) = taken_up({"w0": 95, "w1": 97, "w2": 96}, most_ranks=8)
    assert isinstance(formed, FormWorld) and sorted(formed.members) == ["w0", "w1", "w2"]


def test_found_members_that_save_before_the_run_ends_are_those_with_the_newest_state() -> None:
    controller = Controller(WorldPolicy(workers=1), "w7.", 7, most_ranks=1)
    controller.begin(["w0", "w1"], 0.0)
    controller.handle(StopRequested("test"), 0.1)
    controller.handle(MemberReady("w1", "h", 1, 5), 0.2)
    (last,) = controller.handle(MemberReady("w0", "h", 1, BLANK), 0.3)
    assert isinstance(last, FormWorld) and last.only_saves and last.members == ("w1",)


def test_a_found_member_that_dies_leaves_its_place_to_the_one_with_the_next_newest_state() -> None:
    controller, _ = taken_up({"w0": BLANK, "w1": 90, "w2": 97}, most_ranks=1)
    formed, *_ = controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 1.0)
    assert isinstance(formed, FormWorld) and formed.members == ("w1",)


def test_members_that_still_make_their_dataset_have_their_ten_minutes_also_after_a_take_over() -> None:
    controller = Controller(WorldPolicy(workers=3), "w7.", 7)
    controller.begin(["w0", "w1", "w2"], 0.0)
    for member in ("w0", "w1", "w2"):
        controller.handle(MemberBuilding(member), 0.1)
    tick = Tick(dict.fromkeys(("w0", "w1", "w2"), 0.05))
    assert all(controller.handle(tick, 0.2 * number) == [] for number in range(1, 3000))
    told = (controller.handle(tick, 0.2 * number) for number in range(3000, 3100))
    (end,) = next(filter(None, told))
    assert isinstance(end, End) and "w0, w1, w2 still make their dataset" in end.reason


def test_a_standby_that_was_in_no_world_holds_nobody_up_and_is_in_none_that_does_not_need_it() -> None:
    controller = Controller(WorldPolicy(workers=2, standbys=1), "w7.", 7, copies=1)
    controller.begin(["w0", "w1", "w2"], 0.0)
    controller.handle(MemberReady("w2", "h", 1), 0.1)
    controller.handle(MemberReady("w0", "h", 1, 50, 7), 0.2)
    (formed,) = controller.handle(MemberReady("w1", "h", 1, 50, 7), 0.3)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w1")


def test_who_said_that_it_is_ready_is_not_taken_for_one_that_makes_its_dataset_by_a_late_word() -> None:
    controller, _ = taken_up({"w0": 97, "w1": 97}, most_ranks=8)
    assert controller.handle(MemberBuilding("w0"), 1.0) == []
    assert controller.members.may_hold("w0")
