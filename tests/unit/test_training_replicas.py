"""The replica watch: whoever holds the same compares it, and nothing else, for eight bytes a tensor."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import torch
from torch import Tensor

from elastic.training.replicas import Comparison, Healing, Replicated, compare
from tests.unit.test_training_trainer import WorldOfOne

SIZE = 6
ALL = ((0, 1, 2, 3, 4, 5),)
TEAMS = ((0, 2, 4), (1, 3, 5))  # two shards, of three copies each
PAIRS = ((0, 3), (1, 4), (2, 5))


@dataclass
class Table:
    """Where the ranks of a world lay down what they tell."""

    told: list[Tensor] = field(default_factory=lambda: [torch.empty(0)] * SIZE)
    barrier: Barrier = field(default_factory=lambda: Barrier(SIZE, timeout=20))


@dataclass
class WorldAtATable(WorldOfOne):
    """A world of threads."""

    table: Table = field(default_factory=Table)

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        self.table.told[self.rank] = mine
        self.table.barrier.wait()
        out.copy_(torch.cat(self.table.told))


def held_by(rank: int) -> dict[str, Replicated]:
    """List a whole tensor, rows of a cut, and a state that only the first two ranks and the last hold."""
    team = next(number for number, group in enumerate(TEAMS) if rank in group)
    state = torch.arange(9.0) if rank in (0, 1, 5) else None
    return {
        "whole": Replicated("whole", ALL, torch.ones(2, 3)),
        "rows": Replicated("rows", TEAMS, torch.full((4,), float(team))),
        "others": Replicated("others", PAIRS, torch.full((4, 2), rank % 3 + 0.5)),
        "state": Replicated("state", ((0, 1, 5),), state),
    }


def compared(*flips: tuple[int, str]) -> list[Comparison]:
    """Compare on all ranks, after one bit or another has flipped in each of some ranks' tensors."""
    table = Table()
    held = [held_by(rank) for rank in range(SIZE)]
    for rank, name in flips:
        tensor = held[rank][name].tensor
        assert tensor is not None
        tensor.view(torch.int32).view(-1)[-1] ^= 1 << rank
    worlds = [WorldAtATable(rank=rank, size=SIZE, table=table) for rank in range(SIZE)]
    with ThreadPoolExecutor(SIZE) as ranks:
        found = list(ranks.map(compare, worlds, [list(each.values()) for each in held]))
    assert {each.nbytes for each in table.told} == {8 * len(held[0])}
    assert all(each.healings == found[0].healings for each in found)
    assert all(each.undecided == found[0].undecided for each in found)
    return found


def test_equal_copies_are_equal_though_other_groups_hold_other_values():
    assert compared() == [Comparison([], [], ())] * SIZE


def test_the_majority_of_those_who_hold_the_same_rows_names_the_corrupt_one():
    found = compared((3, "rows"))
    assert found[0].healings == [Healing(1, frozenset({3}), (1,))]
    assert [each.differing for each in found] == [(), (), (), ("rows",), (), ()]


def test_ranks_of_several_groups_are_found_at_once_and_each_is_healed_by_its_own():
    found = compared((0, "rows"), (5, "rows"), (2, "whole"), (0, "state"))
    assert found[0].healings == [
        Healing(0, frozenset({2}), (0,)),
        Healing(2, frozenset({0}), (1,)),
        Healing(1, frozenset({5}), (1,)),
        Healing(1, frozenset({0}), (3,)),
    ]
    assert [each.differing for each in found] == [
        ("rows", "state"),
        *((), ("whole",)),
        *((), (), ("rows",)),
    ]


def test_two_copies_that_differ_are_undecided_by_name():
    (first, *_) = compared((4, "others"))
    assert (first.undecided, first.healings) == (["others"], [])


def test_three_copies_that_all_differ_are_undecided():
    (first, *_) = compared((0, "rows"), (4, "rows"))
    assert (first.undecided, first.healings) == (["rows"], [])
