"""What the ranks of a world tell each other besides gradients and state."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from elastic.control.standing import Standing
from elastic.training.ports import Flags, World

_WORD_BITS = 62  # of virtual ranks in one 64-bit integer


def gather_words(world: World, mine: Any) -> list[Any]:
    """Gather every rank's JSON value, in rank order. Raises Broken."""
    text = json.dumps(mine).encode()
    lengths = torch.empty(world.size, dtype=torch.int64)
    world.all_gather(lengths, torch.tensor([len(text)]))
    longest = int(lengths.max())
    everyones = torch.empty(world.size * longest, dtype=torch.uint8)
    world.all_gather(everyones, torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8))
    rows = everyones.view(world.size, longest)
    return [
        json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)
    ]


def meet(world: World) -> None:
    """Return once every rank of a world has come here. Raises Broken."""
    world.all_gather(torch.empty(world.size, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def agree(world: World, flags: Flags, mine_us: int) -> tuple[Flags, list[int]]:
    """Return what any rank was told, and every rank's pace: that this returns says that all came here.

    Raises Broken.
    """
    told = torch.zeros(2 + world.size, dtype=torch.int64)
    told[0], told[1], told[2 + world.rank] = flags.next_generation, flags.stop, mine_us
    world.all_reduce(told, "max")
    next_generation, stop, *everyones_us = told.tolist()
    return Flags(next_generation, stop), everyones_us


def gather_standings(
    world: World, standing: Standing, held: Sequence[int], num_virtual: int
) -> tuple[list[Standing], list[list[int]]]:
    """Learn where every rank stands, and of which virtual ranks it holds its next step's gradients."""
    num_words = -(-num_virtual // _WORD_BITS)
    mine = torch.zeros(2 + num_words, dtype=torch.int64)
    mine[0], mine[1] = standing.committed, standing.reduced
    for virtual_rank in held:
        mine[2 + virtual_rank // _WORD_BITS] |= 1 << virtual_rank % _WORD_BITS
    everyones = torch.empty(world.size * len(mine), dtype=torch.int64)
    world.all_gather(everyones, mine)
    told = everyones.view(world.size, -1).tolist()
    everyones_held = [
        [v for v in range(num_virtual) if words[v // _WORD_BITS] >> v % _WORD_BITS & 1]
        for _, _, *words in told
    ]
    return [Standing(committed, reduced) for committed, reduced, *_ in told], everyones_held
