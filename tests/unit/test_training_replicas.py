"""The replica watch: whoever holds the same compares it, and nothing else, for sixteen bytes a tensor."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Barrier

import pytest
import torch
from torch import Tensor

from elastic.errors import ReplicasDiffer
from elastic.training.replicas import (
    Group,
    Healing,
    Prints,
    Replicated,
    differing,
    everyones,
    fingerprints,
    healing_of,
)
from elastic.training.watching import MAX_DISPUTES, Disputed, Finding, ReplicaWatch
from tests.unit.test_training_trainer import WorldOfOne

SIZE = 6
CPU = torch.device("cpu")
GOOD = Finding(frozenset(), ())
FIRST = frozenset({0})


@dataclass
class Table:
    """Where the ranks of a world lay down what they tell."""

    size: int
    told: list[Tensor] = field(init=False)
    barrier: Barrier = field(init=False)
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self.told = [torch.empty(0)] * self.size
        self.barrier = Barrier(self.size, timeout=20)


@dataclass
class WorldAtATable(WorldOfOne):
    """A world of threads; what is sent lies on the table too."""

    table: Table = field(default_factory=lambda: Table(SIZE))
    mail: dict[tuple[int, int], SimpleQueue[Tensor]] = field(default_factory=dict)

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        self.table.told[self.rank] = mine
        self.table.num_bytes += mine.nbytes if self.rank == 0 else 0
        self.table.barrier.wait()
        out.copy_(torch.cat(self.table.told))
        self.table.barrier.wait()

    def send(self, tensor: Tensor, to: int) -> None:
        self.mail[self.rank, to].put(tensor.clone())

    def receive(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.mail[source, self.rank].get(timeout=20))


def worlds_of(size: int) -> list[WorldAtATable]:
    table, mail = Table(size), defaultdict[tuple[int, int], SimpleQueue[Tensor]](SimpleQueue)
    return [WorldAtATable(rank=rank, size=size, table=table, mail=mail) for rank in range(size)]


def held_by(rank: int) -> dict[str, Replicated]:
    """List a whole tensor, rows of a cut, others' rows, and a state that three ranks hold."""
    held = [
        Replicated("whole", torch.ones(2, 3)),
        Replicated("rows", torch.full((4,), float(rank % 2)), f"{rank % 2} of 2"),
        Replicated("others", torch.full((4, 2), rank % 3 + 0.5), f"{rank % 3} of 3"),
    ]
    held += [Replicated("state", torch.arange(9.0))] if rank in (0, 1, 5) else []
    return {each.name: each for each in held}


def flip(tensor: Tensor, bit: int = 0) -> None:
    tensor.view(torch.int32).view(-1)[-1] ^= 1 << bit


def found(*flips: tuple[int, str]) -> list[tuple[Group, Healing | None]]:
    """Compare on all ranks, after one bit or another has flipped in each of some ranks' tensors."""
    held = [held_by(rank) for rank in range(SIZE)]
    for rank, name in flips:
        flip(held[rank][name].tensor, rank)
    worlds = worlds_of(SIZE)

    def gather(world: WorldAtATable) -> tuple[list[Prints], list[int]]:
        return everyones(
            world, fingerprints({each.key: each for each in held[world.rank].values()}), world.rank
        )

    with ThreadPoolExecutor(SIZE) as ranks:
        first, *others = list(ranks.map(gather, worlds))
    assert all(each == first for each in others)
    prints, words = first
    assert words == list(range(SIZE))
    assert worlds[0].table.num_bytes == 16 + 16 * 4
    return [(group, healing_of(group, prints)) for group in differing(prints)]


def key(name: str, rank: int) -> int:
    return held_by(rank)[name].key


def test_equal_copies_are_equal_though_other_ranks_hold_other_values():
    assert found() == []


def test_the_majority_of_those_who_hold_the_same_rows_names_the_corrupt_one():
    ((group, healing),) = found((3, "rows"))
    assert group == Group((1, 3, 5), (key("rows", 3),))
    assert healing == Healing(1, frozenset({3}), group.keys)


def test_ranks_of_several_groups_are_found_at_once_and_each_is_healed_by_its_own():
    healings = [healing for _, healing in found((0, "rows"), (5, "rows"), (2, "whole"), (0, "state"))]
    expected = [
        Healing(0, frozenset({2}), (key("whole", 2),)),
        Healing(2, frozenset({0}), (key("rows", 0),)),
        Healing(1, frozenset({5}), (key("rows", 5),)),
        Healing(1, frozenset({0}), (key("state", 0),)),
    ]
    assert len(healings) == len(expected)
    assert all(each in healings for each in expected)


def test_two_copies_that_differ_have_no_majority_and_three_that_all_differ_neither():
    assert found((4, "others")) == [(Group((1, 4), (key("others", 4),)), None)]
    ((group, healing),) = found((0, "rows"), (4, "rows"))
    assert (group.ranks, healing) == ((0, 2, 4), None)


def tensors(size: int, *flips: tuple[int, int]) -> list[Tensor]:
    """Give each rank the same tensor, but for flipped bits: (rank, bit)."""
    made = [torch.arange(8.0) for _ in range(size)]
    for rank, bit in flips:
        flip(made[rank], bit)
    return made


def look(
    watches: list[ReplicaWatch], step: int, held: list[Tensor | None]
) -> list[Finding | Disputed | ReplicasDiffer]:
    """Let all ranks compare one tensor; a rank with None is blank."""
    worlds = worlds_of(len(watches))

    def one(rank: int) -> Finding | Disputed | ReplicasDiffer:
        tensor = held[rank]
        replicas = [] if tensor is None else [Replicated("model/w", tensor)]
        try:
            return watches[rank].look(worlds[rank], step, replicas, lambda: None)
        except (Disputed, ReplicasDiffer) as error:
            return error

    with ThreadPoolExecutor(len(watches)) as ranks:
        return list(ranks.map(one, range(len(watches))))


def watching(size: int) -> list[ReplicaWatch]:
    return [ReplicaWatch(f"w{rank}", CPU) for rank in range(size)]


def test_who_differs_from_the_majority_is_healed_and_one_without_state_has_no_say():
    held = [*tensors(3, (0, 4)), None]
    assert look(watching(4), 5, held) == [Finding(FIRST, ("model/w",)), *[Finding(FIRST, ())] * 3]
    assert all(torch.equal(each, torch.arange(8.0)) for each in held if each is not None)


def test_two_that_differ_are_named_and_who_comes_to_other_bits_when_it_is_computed_again_was_corrupt():
    watches = watching(2)
    for told in look(watches, 6, list(tensors(2, (1, 3)))):
        assert str(told) == (
            "the replicas differ at step 6 in model/w, of w0 and w1, and none has a majority"
        )
    assert look(watches, 5, list(tensors(2))) == [GOOD, GOOD]
    assert look(watches, 6, list(tensors(2))) == [GOOD, Finding(frozenset(), ("model/w",))]
    assert look(watches, 6, list(tensors(2))) == [GOOD, GOOD], "it is said once"


def test_of_two_that_differ_twice_the_one_that_came_to_the_same_bits_is_believed():
    watches, held = watching(2), tensors(2, (0, 5))
    look(watches, 6, list(tensors(2, (0, 3))))
    assert look(watches, 6, list(held)) == [Finding(FIRST, ("model/w",)), Finding(FIRST, ())]
    assert torch.equal(held[0], torch.arange(8.0))


@pytest.mark.parametrize("bits", [[(1, 3)], [(0, 3), (1, 4)]])
def test_a_dispute_that_computing_again_does_not_settle_ends_the_run_by_name_after_a_few_rounds(bits):
    watches = watching(2)
    for number in range(MAX_DISPUTES - 1):
        moved = [(rank, bit + number * (len(bits) - 1) * 4) for rank, bit in bits]
        assert {type(each) for each in look(watches, 6, list(tensors(2, *moved)))} == {Disputed}
        assert look(watches, 4, list(tensors(2))) == [GOOD, GOOD], "getting less far settles nothing"
    for told in look(watches, 7, list(tensors(2, (0, 13)))):
        assert isinstance(told, ReplicasDiffer)
        assert "of w0 and w1" in str(told)
        assert "computes wrongly" in str(told)


def test_who_is_alone_does_not_even_take_fingerprints():
    (world,) = worlds_of(1)
    (watch,) = watching(1)
    nothing = Replicated("model/w", torch.empty(0, device="meta"))
    assert watch.look(world, 1, [nothing], lambda: None) == GOOD
    assert world.table.num_bytes == 0


def test_a_dispute_is_over_once_a_comparison_gets_as_far():
    watches = watching(2)
    for step in range(1, 2 * MAX_DISPUTES):
        assert {type(each) for each in look(watches, step, list(tensors(2, (0, step))))} == {Disputed}
        look(watches, step, list(tensors(2)))
