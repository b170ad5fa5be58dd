"""Shards of the state are given to those who stay before the last of their holders leave in good order."""

from dataclasses import replace

import pytest

from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Ending,
    MemberEnded,
    MemberLeaving,
    MemberLost,
    MemberReady,
    Settled,
    StopRequested,
    WorkersWanted,
)
from elastic.control.instructions import FormWorld, Instruction, ReleaseMember
from elastic.control.policy import WorldPolicy
from elastic.control.sharding import deal_states
from tests.controlled import stepping, tell_all


def sharded(workers: int, copies: int) -> Controller:
    """A controller whose members have made a step, and hold shards of the state."""
    controller = stepping(workers)
    controller.copies = copies
    return controller


def formed(told: list[Instruction]) -> FormWorld:
    """The world that these instructions order."""
    (order,) = (one for one in told if isinstance(one, FormWorld))
    return order


@pytest.mark.parametrize("copies", [1, 2])
def test_two_that_are_too_many_give_their_shards_away_before_a_world_goes_on_without_them(
    copies: int,
) -> None:
    controller = sharded(4, copies)
    giving = formed(controller.handle(WorkersWanted(2), 4.0))
    assert (giving.members, giving.leaving) == (("w0", "w1", "w2", "w3"), ("w2", "w3"))
    tell_all(controller, "w0", "w1", "w2", "w3", at=5.0)
    assert controller.members.world == ("w0", "w1"), "the next one is ordered as soon as all have settled"
    tell_all(controller, "w0", at=6.0)
    released = [
        one
        for one in controller.handle(Settled("w1", 3, 1, "self", 0.1), 6.0)
        if isinstance(one, ReleaseMember)
    ]
    assert {one.member for one in released} == {"w2", "w3"}


def test_where_who_got_the_state_dies_at_once_those_who_gave_it_are_not_ended_and_go_on_with_it() -> None:
    controller = sharded(3, 2)
    controller.handle(WorkersWanted(1), 4.0)
    tell_all(controller, "w0", "w1", "w2", at=5.0)
    assert controller.members.world == ("w0",)
    told = controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 5.1)
    order = formed(told)
    assert (order.members, order.leaving) == (("w1", "w2"), ("w2",))


@pytest.mark.parametrize("copies", [0, 3])
def test_where_another_copy_stays_the_world_goes_on_without_them_at_once(copies: int) -> None:
    order = formed(sharded(4, copies).handle(WorkersWanted(2), 4.0))
    assert (order.members, order.leaving) == (("w0", "w1"), ())


def test_who_will_be_taken_away_gives_its_only_copy_also_where_another_one_dies() -> None:
    controller = sharded(3, 2)
    assert formed(controller.handle(MemberLeaving("w2", "drained"), 4.0)).leaving == ()
    giving = formed(controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 4.1))
    assert (giving.members, giving.leaving) == (("w0", "w2"), ("w2",))


def test_a_standby_that_an_earlier_drivers_first_world_had_gives_back_what_it_got() -> None:
    controller = Controller(WorldPolicy(workers=2, standbys=1), "w7.", generation=7, copies=1)
    controller.begin(["w0", "w1", "w2"], 0.0)
    for member, step in (("w0", 50), ("w1", 50), ("w2", -1)):
        controller.handle(MemberReady(member, "h", 1, step, 7), 0.5)
    tell_all(controller, "w0", "w1", "w2", at=1.0)
    assert controller.diagnosis.step == 1
    assert controller.roll.ranks == ("w0", "w1", "w2"), "w2 gives"
    tell_all(controller, "w0", "w1", "w2", at=2.0)
    assert controller.members.world == ("w0", "w1")


def test_a_stop_while_shards_are_given_is_followed_once_they_are() -> None:
    controller = sharded(2, 1)
    controller.handle(WorkersWanted(1), 4.0)
    controller.handle(StopRequested("test"), 4.1)
    tell_all(controller, "w0", "w1", at=5.0)
    assert controller.members.world == ("w0",)
    assert controller.roll.is_closing


def test_who_is_leaving_is_dealt_no_state() -> None:
    holders = deal_states([8, 4, 2, 1], [{0}, {1}, {2}, {3}], ["a", "b", "c", "d"], 2, leaving={2, 3})
    assert all(sorted(ranks) == [0, 1] for ranks in holders)


def all_leaving(workers: int, newcomers: int, most_ranks: int = 1 << 30) -> tuple[Controller, FormWorld]:
    """A controller, and its next world where all who hold a shard will be taken away and newcomers came."""
    controller = sharded(workers, 1)
    controller.most_ranks = most_ranks
    controller.policy = replace(controller.policy, min_workers=2)
    held = [f"w{number}" for number in range(workers)]
    controller.members.settle()
    for member in held:
        controller.members.part(member, "drained")
    for number in range(newcomers):
        controller.members.admit(MemberReady(f"n{number}", "h", 1))
    return controller, formed(controller.handle(MemberReady("n", "h", 1), 4.0))


def test_where_all_are_taken_away_all_of_them_give_what_they_hold_to_newcomers() -> None:
    _, order = all_leaving(3, newcomers=2)
    assert set(order.leaving) == {"w0", "w1", "w2"}, "none of them needs room for all of it"
    assert set(order.members) - set(order.leaving) == {"n0", "n1"}


def test_as_many_newcomers_get_it_as_there_are_places_beside_all_who_give() -> None:
    _, order = all_leaving(3, newcomers=2, most_ranks=4)
    assert (order.members, order.leaving) == (("n0", "w0", "w1", "w2"), ("w0", "w1", "w2"))


def test_without_a_place_beside_them_one_of_them_gets_it_all() -> None:
    _, order = all_leaving(3, newcomers=2, most_ranks=3)
    assert (order.members, order.leaving) == (("w0", "w1", "w2"), ("w1", "w2"))


def test_where_nobody_knows_whether_newcomers_have_got_it_yet_they_are_in_the_world_that_saves() -> None:
    controller, giving = all_leaving(3, newcomers=2)
    controller.policy = replace(controller.policy, min_workers=9)
    saving = formed(controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 5.0))
    assert saving.only_saves and set(saving.members) == set(giving.members) - {"w0"}


def test_a_newcomer_that_saved_beside_those_who_are_taken_away_is_in_the_world_after_them() -> None:
    controller, _ = all_leaving(3, newcomers=1)
    controller.policy = replace(controller.policy, min_workers=9)
    saving = formed(controller.handle(MemberLost("w0", Cause.PROCESS_DIED, ""), 5.0))
    tell_all(controller, *saving.members, at=5.5)
    controller.policy = replace(controller.policy, workers=2, min_workers=2)
    told = [
        each
        for one in saving.members
        for each in controller.handle(MemberEnded(one, saving.generation, 1, Ending.STOPPED), 6.0)
    ]
    assert set(formed(told).members) == {"n0", "n"}
