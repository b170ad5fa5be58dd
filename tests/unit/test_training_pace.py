"""Dealing by measured speed: it finds a slow rank within a few steps, and noise does not move it."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.training.pace import Pace

V, CPU = 28, torch.device("cpu")
HALF_SPEED, LEVEL = (8, 8, 8, 4), (7, 7, 7, 7)


class Ranks:
    """Paces of a world whose virtual ranks take 40 ms each on a busy machine: some a little more, a few far
    more.
    """

    def __init__(self, seed: int, slowness: tuple[float, ...] = (1, 1, 1, 2)) -> None:
        self._rng = random.Random(seed)
        self.slowness = slowness
        self.paces = [Pace(CPU) for _ in slowness]

    def step(self) -> tuple[int, ...]:
        dealings = {pace.deal(V, len(self.paces)) for pace in self.paces}
        (dealt,) = dealings
        for pace, hand, slow in zip(self.paces, dealt, self.slowness, strict=True):
            for _ in hand:
                hiccup = self._rng.uniform(1, 5) if self._rng.random() < 0.08 else 1.0
                pace.note(0.04 * slow * self._rng.uniform(1, 1.15) * hiccup)
        told = [pace.mine_us for pace in self.paces]
        for pace in self.paces:
            pace.learn(told)
        return tuple(map(len, dealt))


@settings(max_examples=15)
@given(st.integers(0, 10**9))
def test_a_rank_at_half_speed_has_half_the_work_after_three_steps_and_keeps_it_under_noise(seed):
    ranks = Ranks(seed)
    dealt = [ranks.step() for _ in range(60)]
    assert dealt[0] == LEVEL
    assert dealt[3:].count(HALF_SPEED) >= 0.9 * len(dealt[3:])
    assert sum(one != other for one, other in pairwise(dealt[3:])) <= 4


@settings(max_examples=15)
@given(st.integers(0, 10**9))
def test_noise_alone_hardly_ever_moves_an_even_dealing(seed):
    ranks = Ranks(seed, (1, 1, 1, 1))
    dealt = [ranks.step() for _ in range(60)]
    assert dealt.count(LEVEL) >= 0.9 * len(dealt)


@settings(max_examples=15)
@given(st.integers(0, 10**9))
def test_a_rank_that_has_recovered_gets_its_work_back(seed):
    ranks = Ranks(seed)
    for _ in range(5):
        ranks.step()
    ranks.slowness = (1, 1, 1, 1)
    assert LEVEL in [ranks.step() for _ in range(8)]


def test_a_new_world_begins_even_and_knows_no_dealing_of_the_one_before():
    ranks = Ranks(1)
    for _ in range(5):
        ranks.step()
    for pace in ranks.paces:
        pace.forget_others()
    assert ranks.step() == LEVEL


def test_a_virtual_rank_that_raises_is_over():
    pace = Pace(CPU)
    pace.note(0.04)
    with pytest.raises(ZeroDivisionError), pace.measured():
        raise ZeroDivisionError
    assert pace.working_s == 0
    assert pace.mine_us == 40_000
