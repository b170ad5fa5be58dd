"""Settling: whatever survivors hold, they come to one step, and nobody applies what not all of them hold."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.dealing import deal
from elastic.control.standing import BLANK, Standing, settle


@st.composite
def survivors(draw: st.DrawFn) -> list[Standing]:
    """What can be left of a world: a step was being reduced, agreed or applied when somebody died; plus blank
    joiners.
    """
    step = draw(st.integers(0, 5))
    if draw(
        st.booleans()
    ):  # the agreement was reached: some have applied the step, the others hold its gradients
        reachable = [Standing(step + 1), Standing(step, reduced=step)]
    else:  # it was not: some hold the reduced gradients, some do not
        reachable = [Standing(step), Standing(step, reduced=step)]
    living = draw(st.lists(st.sampled_from(reachable), min_size=1, max_size=6))
    return draw(st.permutations(living + [Standing(BLANK)] * draw(st.integers(0, 3))))


@given(survivors())
def test_everybody_comes_to_the_same_step_and_no_committed_one_is_lost(standings: list[Standing]) -> None:
    settlement = settle(standings)
    newest = max(standing.committed for standing in standings)
    assert settlement.step in (newest, newest + 1)
    for rank, standing in enumerate(standings):
        after = standing.committed
        if rank in settlement.appliers:
            assert standing.reduced == standing.committed
            after += 1
        if rank in settlement.receivers:
            after = settlement.step
        assert after == settlement.step
    assert settlement.source not in settlement.receivers
    assert not settlement.appliers & settlement.receivers


@given(survivors())
def test_reduced_gradients_are_applied_only_if_all_hold_them_or_somebody_applied_them(
    standings: list[Standing],
) -> None:
    settlement = settle(standings)
    living = [standing for standing in standings if standing.committed != BLANK]
    somebody_applied = len({standing.committed for standing in living}) > 1
    all_hold = all(standing.reduced == standing.committed for standing in living)
    assert bool(settlement.appliers) == (somebody_applied or all_hold)


@given(st.integers(1, 8))
def test_a_world_of_blanks_names_a_source_that_has_to_restore(size: int) -> None:
    settlement = settle([Standing(BLANK)] * size)
    assert settlement.step == BLANK
    assert settlement.receivers == frozenset(range(1, size))


@given(st.integers(1, 64), st.integers(1, 64))
def test_dealing_gives_every_virtual_rank_to_exactly_one_rank_and_is_even(
    num_virtual: int, size: int
) -> None:
    if size > num_virtual:
        return
    hands = deal(num_virtual, (0.0,) * size)
    assert [v for hand in hands for v in hand] == list(range(num_virtual))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
