"""The replica watch: ranks compare fingerprints of what they hold alike; a corrupt one is found and named.

A bit that flips in memory, or an accelerator that computes wrongly, raises no error: without a comparison the
replicas drift apart and every checkpoint after is worthless, or a copy of a shard is trusted once the other
one is lost. Costs 16 bytes a tensor on the wire.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from checkpoint import fingerprint_tensor, flatten_state
from elastic.control.majority import judge
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.ports import World

_SIGN = 1 << 63

Prints = Mapping[int, int]
"""Fingerprints, by the keys of what has them."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """A tensor, or the named part of one, of which every rank that lists it holds the same."""

    name: str
    tensor: Tensor
    part: str = ""

    @property
    def key(self) -> int:
        """A number for it, the same on every rank."""
        digest = blake2b(f"{self.name}\n{self.part}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that hold the same tensors, of which some differ: `keys` name these."""

    ranks: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Healing:
    """The tensors `keys`, which rank `source` gives each of the ranks `corrupt`."""

    source: int
    corrupt: frozenset[int]
    keys: tuple[int, ...]


def held_alike(state: Any) -> list[Replicated]:
    """List the tensors of a state that all ranks with a state hold alike."""
    return [Replicated(name, tensor) for name, tensor in flatten_state(state).tensors.items()]


def leaf_name(parameter: str, key: str) -> str:
    """Name a parameter's values (with no key) or a part of its optimizer's state, as a whole state does."""
    return f"optimizer/state/{parameter}/{key}" if key else f"model/{parameter}"


def fingerprints(held: Mapping[int, Replicated]) -> Prints:
    """Take the fingerprint of each tensor."""
    return {key: fingerprint_tensor(each.tensor) for key, each in held.items()}


def everyones(world: World, mine: Prints, word: int) -> tuple[list[Prints], list[int]]:
    """Gather every rank's fingerprints, of whatever it holds, and a small number. Raises Broken."""
    told = torch.empty(2 * world.size, dtype=torch.int64)
    world.all_gather(told, torch.tensor([len(mine), word]))
    lengths, words = told.view(-1, 2).T.tolist()
    table = torch.zeros(max(lengths), 2, dtype=torch.int64)
    if mine:
        signed = [(key - _SIGN, fingerprint - _SIGN) for key, fingerprint in mine.items()]
        table[: len(mine)] = torch.tensor(signed, dtype=torch.int64)
    gathered = torch.empty(world.size * table.numel(), dtype=torch.int64)
    world.all_gather(gathered, table.flatten())
    rows = gathered.view(world.size, -1, 2).tolist()
    return [
        {key + _SIGN: fingerprint + _SIGN for key, fingerprint in row[:length]}
        for row, length in zip(rows, lengths, strict=True)
    ], words


def differing(prints: Sequence[Prints]) -> list[Group]:
    """List who holds the same tensors, of which some differ: the same on every rank."""
    holders: dict[int, list[int]] = defaultdict(list)
    for rank, each in enumerate(prints):
        for key in each:
            holders[key].append(rank)
    keys_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for key, ranks in sorted(holders.items()):
        if len({prints[rank][key] for rank in ranks}) > 1:
            keys_of[tuple(ranks)].append(key)
    return [Group(ranks, tuple(keys)) for ranks, keys in keys_of.items()]


def healing_of(group: Group, prints: Sequence[Prints]) -> Healing | None:
    """Say who of a group heals whom, if more than half of them agree."""
    verdict = judge([[prints[rank][key] for key in group.keys] for rank in group.ranks])
    if verdict.source is None:
        return None
    corrupt = frozenset(group.ranks[index] for index in verdict.corrupt)
    return Healing(group.ranks[verdict.source], corrupt, group.keys)


def heal(
    world: World, held: Mapping[int, Replicated], healings: Sequence[Healing], device: torch.device
) -> None:
    """Give the corrupt ranks what the good ones hold, in place. Raises Broken."""
    for each in healings:
        if world.rank == each.source:
            tensors = [held[key].tensor for key in each.keys]
            hand_over(world, sorted(each.corrupt), Parcel(tensors, "self"), device)
        if world.rank in each.corrupt:
            taken = accept(world, each.source, device).state
            with torch.no_grad():
                for key, right in zip(each.keys, taken, strict=True):
                    held[key].tensor.copy_(right)
