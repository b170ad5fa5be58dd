"""The replica watch: ranks compare fingerprints of what they hold alike; a corrupt one is found and named.

A bit that flips in memory, or an accelerator that computes wrongly, raises no error: without a comparison the
replicas drift apart and every checkpoint after is worthless, or a copy of a shard is trusted once the other
one is lost. Costs 8 bytes a tensor on the wire.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoint import fingerprint_tensor, flatten_state
from elastic.control.majority import judge
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.ports import World

_SIGN = 1 << 63

Groups = tuple[tuple[int, ...], ...]
"""Ranks that hold the same, group by group."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """A tensor, or a part of one, of which the ranks of each group hold the same; None where nothing is."""

    name: str
    groups: Groups
    tensor: Tensor | None


@dataclass(frozen=True, slots=True)
class Healing:
    """The tensors `numbers` of what was compared, which rank `source` gives each of the ranks `corrupt`."""

    source: int
    corrupt: frozenset[int]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found: what can be healed, and the tensors of which no majority holds the same, alike
    on every rank; `differing` are those that are corrupt on this one.
    """

    healings: Sequence[Healing]
    undecided: Sequence[str]
    differing: tuple[str, ...]


def held_by_all(world: World, state: Any) -> list[Replicated]:
    """List the tensors of a state that all ranks of a world hold alike."""
    everyone = (tuple(range(world.size)),)
    return [Replicated(name, everyone, tensor) for name, tensor in flatten_state(state).tensors.items()]


def leaf_name(parameter: str, key: str) -> str:
    """Name a parameter's values (with no key) or a part of its optimizer's state, as a whole state does."""
    return f"optimizer/state/{parameter}/{key}" if key else f"model/{parameter}"


def compare(world: World, replicas: Sequence[Replicated]) -> Comparison:
    """Compare what the ranks of a world hold; all of them list the same tensors. Raises Broken."""
    fingerprints = _everyones(world, replicas)
    numbers_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, each in enumerate(replicas):
        for group in each.groups:
            numbers_of[group].append(number)
    healings: list[Healing] = []
    undecided: dict[str, None] = {}
    for group, numbers in numbers_of.items():
        differing = [n for n in numbers if len({fingerprints[rank][n] for rank in group}) > 1]
        verdict = judge([[fingerprints[rank][n] for n in differing] for rank in group])
        if verdict.source is None:
            undecided |= dict.fromkeys(replicas[n].name for n in differing)
        elif differing:
            corrupt = frozenset(group[index] for index in verdict.corrupt)
            healings.append(Healing(group[verdict.source], corrupt, tuple(differing)))
    mine = fingerprints[world.rank]
    wrong = [
        replicas[n].name
        for each in healings
        if world.rank in each.corrupt
        for n in each.numbers
        if mine[n] != fingerprints[each.source][n]
    ]
    return Comparison(healings, list(undecided), tuple(wrong))


def heal(world: World, replicas: Sequence[Replicated], found: Comparison, device: torch.device) -> None:
    """Give the corrupt ranks what the majority holds, in place. Raises Broken."""
    for each in found.healings:
        held = [replicas[number].tensor for number in each.numbers]
        tensors = [tensor for tensor in held if tensor is not None]
        if world.rank == each.source:
            hand_over(world, sorted(each.corrupt), Parcel(tensors, "self"), device)
        if world.rank in each.corrupt:
            with torch.no_grad():
                for tensor, right in zip(tensors, accept(world, each.source, device).state, strict=True):
                    tensor.copy_(right)


def _everyones(world: World, replicas: Sequence[Replicated]) -> list[list[int]]:
    """Gather every rank's fingerprints; of what is not there, a zero."""
    mine = torch.tensor(
        [fingerprint_tensor(each.tensor) - _SIGN if each.tensor is not None else 0 for each in replicas],
        dtype=torch.int64,
    )
    everyones = torch.empty(world.size * len(mine), dtype=torch.int64)
    world.all_gather(everyones, mine)
    told: list[list[int]] = everyones.view(world.size, len(mine)).tolist()
    return told
