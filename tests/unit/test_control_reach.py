"""Who is cut off from its peers: named once it is told twice in a row or by all others, and nobody else."""

from collections.abc import Mapping

import pytest

from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Ending,
    MemberEnded,
    MemberLost,
    MemberReady,
    StepCommitted,
    WorldBroken,
)
from elastic.control.instructions import FormWorld, Instruction, KillMember, ReleaseMember
from elastic.control.reach import Reach
from tests.controlled import pass_time, stepping, tell_all

RANKS = ("w0", "w1", "w2", "w3")
ALL = frozenset(RANKS)
Word = Mapping[str, tuple[str, ...]]


def said(*rounds: Word, reach: Reach | None = None) -> Reach:
    """What members said of whom they cannot reach, world by world."""
    reach = reach or Reach()
    for generation, each in enumerate(rounds, reach._settled + 1):
        for member, unreachable in each.items():
            for _ in range(2):  # a word that comes twice counts once
                reach.take(WorldBroken(member, generation, "test", False, unreachable))
    return reach


def test_who_is_out_of_reach_of_all_others_is_named_at_once_by_three_and_in_the_second_round_by_one() -> None:
    reach = said({"w0": ("w2",), "w1": ("w2",), "w3": ("w2",)})
    assert reach.name(RANKS, ALL) == {"w2": "3 of 3 workers cannot reach w2, though it answers"}
    reach = said({"w0": ("w1",)})
    assert reach.name(("w0", "w1"), frozenset(("w0", "w1"))) == {}


def test_who_cannot_reach_the_others_is_named_though_they_blame_it_of_nothing() -> None:
    word = {"w1": ("w0", "w2", "w3"), "w0": (), "w2": (), "w3": ()}
    assert said(word).name(RANKS, ALL) == {}
    named = said(word, word).name(RANKS, ALL)
    assert named == {"w1": "w1 cannot reach 3 of 3 workers, though it answers"}


def test_a_hiccup_names_nobody() -> None:
    reach = said({"w0": ("w1",), "w1": ("w0",)}, {"w0": (), "w1": ()}, {"w0": ("w1",), "w1": ("w0",)})
    assert reach.name(RANKS, ALL) == {}
    reach = said({"w0": ("w1",), "w1": ("w0",)})
    reach.settle(2)
    assert said({"w0": ("w1",), "w1": ("w0",)}, reach=reach).name(RANKS, ALL) == {}


def test_a_world_that_broke_for_another_reason_neither_adds_to_what_was_said_nor_takes_from_it() -> None:
    reach = said({"w0": ("w1",), "w1": ("w0",)})
    reach.take(WorldBroken("w0", 2, "the last checkpoint was lost"))
    reach.take(WorldBroken("w0", 3, "test", False, ("w1",)))
    assert reach.name(RANKS, ALL).keys() == {"w1"}


@pytest.mark.parametrize(
    ("holding", "named"), [({"w0", "w1"}, "w1"), ({"w1"}, "w0"), ({"w0"}, "w1"), (set(), "w1")]
)
def test_of_a_pair_the_one_without_state_goes_and_else_the_higher_rank(holding: set[str], named: str) -> None:
    word: Word = {"w0": ("w1",), "w1": ("w0",)}
    assert said(word, word).name(("w0", "w1"), frozenset(holding)).keys() == {named}


def test_of_a_pair_the_one_that_says_nothing_goes() -> None:
    word: Word = {"w1": ("w0",)}
    assert said(word, word).name(("w0", "w1"), frozenset(("w0", "w1"))).keys() == {"w0"}


def test_who_stayed_of_a_pair_and_is_apart_from_the_next_one_as_well_goes_this_time() -> None:
    word: Word = {"w0": ("w1",), "w1": ("w0",)}
    reach = said(word, word)
    assert reach.name(("w0", "w1"), ALL).keys() == {"w1"}
    reach.settle(2)
    reach.acquit(("w0",))  # in a world of its own it has reached nobody
    again: Word = {"w0": ("w2",), "w2": ("w0",)}
    assert said(again, again, reach=reach).name(("w0", "w2"), frozenset(("w0",))).keys() == {"w0"}
    reach.settle(5)
    reach.acquit(("w2", "w3"))
    once_more: Word = {"w2": ("w3",), "w3": ("w2",)}
    assert said(once_more, once_more, reach=reach).name(("w2", "w3"), ALL).keys() == {"w3"}


def test_where_a_network_is_parted_the_smaller_side_goes() -> None:
    word: Word = {"w0": ("w3",), "w1": ("w3",), "w2": ("w3",), "w3": ("w0", "w1", "w2")}
    assert said(word, word).name(RANKS, ALL).keys() == {"w3"}


def torn() -> Controller:
    """A controller whose second world forms, of the three of the first, as nothing moved in that."""
    controller = stepping(3)
    (roll,) = pass_time(controller, 3.0, 20.0)
    assert isinstance(roll, FormWorld) and roll.members == ("w0", "w1", "w2")
    return controller


def disconnect(controller: Controller, word: Word, at: float) -> list[Instruction]:
    """Let the newest world fail to connect; return what is done about it."""
    for member, unreachable in word.items():
        controller.handle(WorldBroken(member, controller.formed, "timed out", False, unreachable), at)
    return pass_time(controller, at, at + 10.0)


def test_a_member_that_its_peers_cannot_reach_is_ended_with_evidence_and_the_others_go_on() -> None:
    controller = torn()
    word: Word = {"w0": ("w1",), "w1": ("w0",), "w2": ()}
    (again,) = disconnect(controller, word, 20.0)
    assert isinstance(again, FormWorld) and again.members == ("w0", "w1", "w2"), "it may be over by now"
    killed, formed = disconnect(controller, word, 30.0)
    assert killed == KillMember("w1", "1 of 2 workers cannot reach w1, though it answers", Cause.CUT_OFF)
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w2")


def test_who_is_cut_off_from_all_others_is_ended_the_first_time() -> None:
    controller = torn()
    killed, formed = disconnect(controller, {"w0": ("w2",), "w1": ("w2",), "w2": ("w0", "w1")}, 20.0)
    assert isinstance(killed, KillMember) and killed.cause is Cause.CUT_OFF
    assert isinstance(formed, FormWorld) and formed.members == ("w0", "w1")


def test_the_only_one_that_holds_the_state_saves_it_alone_before_it_goes_as_it_is_cut_off() -> None:
    controller = torn()
    controller.handle(MemberLost("w1", Cause.PROCESS_DIED, ""), 20.0)
    controller.handle(MemberLost("w2", Cause.PROCESS_DIED, ""), 20.0)
    tell_all(controller, "w0", at=20.5)
    controller.handle(StepCommitted("w0", controller.formed, 7, 1.0, 0.5, 1, 0.0), 21.0)
    for member in ("w3", "w4"):
        controller.handle(MemberReady(member, "h", 1), 22.0)
    word: Word = {"w0": ("w3", "w4"), "w3": ("w0",), "w4": ("w0",)}
    (again,) = disconnect(controller, {"w0": ("w3",), "w3": ("w0",)}, 23.0)
    assert isinstance(again, FormWorld) and again.members == ("w0", "w3", "w4")
    (last,) = disconnect(controller, word, 33.0)
    assert isinstance(last, FormWorld) and (last.members, last.only_saves) == (("w0",), True)
    tell_all(controller, "w0", at=40.0)
    released, *_, formed = controller.handle(MemberEnded("w0", last.generation, 7, Ending.STOPPED), 41.0)
    assert isinstance(released, ReleaseMember) and "2 of 2 workers cannot reach w0" in released.reason
    assert isinstance(formed, FormWorld) and formed.members == ("w3", "w4")
    assert controller.roll.origin == "store"
