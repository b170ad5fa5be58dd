"""How many standbys are kept."""

from math import comb

import pytest

from elastic.control.standbys import num_standbys


@pytest.mark.parametrize("workers", [1, 4, 64, 1000])
def test_the_standbys_suffice_in_99_of_100_cases_and_one_fewer_would_not(workers: int) -> None:
    def covered(count: int) -> float:
        return sum(comb(workers, k) * 0.004**k * 0.996 ** (workers - k) for k in range(count + 1))

    count = num_standbys(workers)
    assert covered(count) >= 0.99
    assert count == 0 or covered(count - 1) < 0.99


def test_a_fleet_of_a_thousand_keeps_one_in_a_hundred() -> None:
    assert [num_standbys(workers) for workers in (1, 4, 1000)] == [0, 1, 9]
