"""Majority: who holds other bits than most is corrupt; without a majority nobody is believed."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.majority import Verdict, judge


def test_one_of_three_that_differs_in_one_tensor_is_corrupt() -> None:
    assert judge([[1, 2], [1, 3], [1, 2]]) == Verdict(frozenset({1}), 0)
    assert judge([[9, 2], [1, 2], [1, 2]]) == Verdict(frozenset({0}), 1)


def test_of_two_that_differ_neither_is_believed() -> None:
    assert judge([[1], [2]]) == Verdict(frozenset({0, 1}), None)
    assert judge([[1], [1], [2], [2]]).source is None


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_a_minority_is_named_whatever_it_holds(is_good, data) -> None:
    held = [[7, 8] if good else [data.draw(st.integers(0, 3)), 8] for good in is_good]
    verdict = judge(held)
    if 2 * sum(is_good) > len(is_good):
        assert verdict.corrupt == {rank for rank, good in enumerate(is_good) if not good}
        assert verdict.source == is_good.index(True)
