"""Tells an optimizer's fp32 masters from others': a weight is its master, rounded, whenever a step is done.

Names, shapes and counts agree where states lie under another parameter's name, or at another place of a flat
buffer. Contents do not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.interop.formats.contract import Array, ForeignCheckpoint
from checkpoint.interop.formats.rounding import ROUNDED, round_bits, widen_bits

_MASTER = "optimizer.master."
_MAX_COMPARED = 64  # masters, evenly among all: each takes two requests
_ELEMENTS = 1024

Read = Callable[[Box], Array]


class Weight(Protocol):
    """What has a dtype and a shape."""

    @property
    def dtype(self) -> str:
        """One of `ROUNDED`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the master's."""


def check_masters(
    opened: ForeignCheckpoint, where: str, parts: Sequence[tuple[int, Box]] = (), *, hint: str = ""
) -> None:
    """See that samples of masters, rounded, are their weights. Raises Corrupt naming one that is not.

    Parts, each a box of the master of a number, are looked at as well: such as one of every rank's file.
    A hint is added to what the error says.
    """
    owners = _owners(opened)
    pairs = list(owners.items())
    chosen = pairs[:: -(-len(pairs) // _MAX_COMPARED) or 1]
    whole = [(number, Box.whole(opened.tensors[owner].shape)) for number, owner in chosen]
    for number, part in (*whole, *((number, part) for number, part in parts if number in owners)):
        owner = owners[number]
        master, weight = opened.tensors[number], opened.tensors[owner]
        read, read_weight = partial(opened.read, number), partial(opened.read, owner)
        if master.shape != weight.shape or not is_rounded(read, read_weight, weight, part):
            raise Corrupt(
                f"{where}: {master} is not what {weight} was rounded from: the optimizer's states lie "
                "under others' names, or are of another rank or step, and its moments are not believed either"
                f"{hint}"
            )


def _owners(opened: ForeignCheckpoint) -> dict[int, int]:
    """Return the number of each fp32 master's weight by its own."""
    numbers = {(tensor.name, *tensor.at.items()): number for number, tensor in enumerate(opened.tensors)}
    found = {}
    for number, tensor in enumerate(opened.tensors):
        owner = numbers.get((tensor.name.removeprefix(_MASTER), *tensor.at.items()))
        is_master = tensor.name.startswith(_MASTER) and tensor.dtype == "float32"
        if is_master and owner is not None and opened.tensors[owner].dtype in ROUNDED:
            found[number] = owner
    return found


def is_rounded(master: Read, rounded: Read, weight: Weight, part: Box | None = None) -> bool:
    """Tell whether samples of an fp32 master, rounded, are those of its weight, or of a part of it."""
    part = Box.whole(weight.shape) if part is None else part
    samples = [box.moved((0,) * len(box.size), part.start) for box in _samples(part.size)]
    return all(_agree(round_bits(master(box), weight.dtype), rounded(box), weight.dtype) for box in samples)


def _agree(one: Array, other: Array, dtype: str) -> bool:
    """Tell whether bits are the same, or both of NaN: devices round it to different ones."""
    is_same = one == other
    if not is_same.all():
        values = [widen_bits(bits, dtype).view(np.float32) for bits in (one, other)]
        is_same |= np.isnan(values[0]) & np.isnan(values[1])
    return bool(is_same.all())


def _samples(shape: tuple[int, ...]) -> list[Box]:
    """Return some of the first elements of a tensor, and some of the last."""
    budget, size = _ELEMENTS, []
    for n in shape[::-1]:
        size.append(min(n, max(1, budget)))
        budget //= max(1, n)
    counts = tuple(size[::-1])
    ends = tuple(n - count for n, count in zip(shape, counts, strict=True))
    return [Box(start, counts) for start in dict.fromkeys([(0,) * len(shape), ends])]
