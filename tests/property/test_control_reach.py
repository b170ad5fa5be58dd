"""Whatever pairs of a world cannot reach each other: who is left can."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.events import WorldBroken
from elastic.control.reach import Reach

Pairs = set[tuple[str, str]]


@st.composite
def rifts(draw: st.DrawFn) -> tuple[tuple[str, ...], Pairs, frozenset[str]]:
    """A world, its pairs that cannot reach each other, and who holds the state."""
    ranks = tuple(f"w{rank}" for rank in draw(st.permutations(range(draw(st.integers(2, 7))))))
    pairs = draw(st.sets(st.sampled_from(list(combinations(ranks, 2)))))
    return ranks, pairs, frozenset(draw(st.sets(st.sampled_from(ranks), min_size=1)))


def named(ranks: tuple[str, ...], pairs: Pairs, holding: frozenset[str], rounds: int = 2) -> dict[str, str]:
    """Let every member say so many times in a row whom it cannot reach."""
    reach = Reach()
    for generation in range(1, rounds + 1):
        for one in ranks:
            apart = tuple(other for other in ranks if (one, other) in pairs or (other, one) in pairs)
            reach.take(WorldBroken(one, generation, "test", False, apart))
    return reach.name(ranks, holding)


@given(rifts())
def test_who_is_left_is_in_reach_of_each_other_and_nobody_goes_whom_all_reach(
    rift: tuple[tuple[str, ...], Pairs, frozenset[str]],
) -> None:
    _, pairs, _ = rift
    gone = named(*rift)
    assert not any(one not in gone and other not in gone for one, other in pairs)
    assert gone.keys() <= {one for pair in pairs for one in pair}
    assert all(evidence for evidence in gone.values())


@given(rifts(), st.data())
def test_one_that_is_cut_off_from_all_others_is_named_alone_and_at_once(
    rift: tuple[tuple[str, ...], Pairs, frozenset[str]], data: st.DataObject
) -> None:
    ranks, _, holding = rift
    victim = data.draw(st.sampled_from(ranks))
    pairs = {(victim, other) for other in ranks if other != victim}
    if len(ranks) > 2:
        assert named(ranks, pairs, holding, rounds=1).keys() == {victim}
