"""Tells an optimizer's fp32 masters from others': a weight is its master, rounded, whenever a step is done.

Names, shapes and counts agree where states lie under another parameter's name, or at another place of a flat
buffer. Contents do not.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.interop.formats.contract import Array, ForeignCheckpoint
from checkpoint.interop.formats.rounding import ROUNDED, round_bits

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


def check_masters(opened: ForeignCheckpoint, where: str) -> None:
    """See that samples of masters, rounded, are their weights. Raises Corrupt naming one that is not."""
    numbers = {(tensor.name, *tensor.at.items()): number for number, tensor in enumerate(opened.tensors)}
    pairs = []
    for number, tensor in enumerate(opened.tensors):
        owner = numbers.get((tensor.name.removeprefix(_MASTER), *tensor.at.items()))
        is_master = tensor.name.startswith(_MASTER) and tensor.dtype == "float32"
        if is_master and owner is not None and opened.tensors[owner].dtype in ROUNDED:
            pairs.append((number, owner))
    for number, other in pairs[:: -(-len(pairs) // _MAX_COMPARED) or 1]:
        master, weight = opened.tensors[number], opened.tensors[other]
        read, read_weight = partial(opened.read, number), partial(opened.read, other)
        if master.shape != weight.shape or not is_rounded(read, read_weight, weight):
            raise Corrupt(
                f"{where}: {master} is not what {weight} was rounded from: the optimizer's states lie "
                "under others' names, or are of another step, and its moments are not believed either"
            )


def is_rounded(master: Read, rounded: Read, weight: Weight, part: Box | None = None) -> bool:
    """Tell whether samples of an fp32 master, rounded, are those of its weight, or of a part of it."""
    part = Box.whole(weight.shape) if part is None else part
    samples = [box.moved((0,) * len(box.size), part.start) for box in _samples(part.size)]
    return all((round_bits(master(box), weight.dtype) == rounded(box)).all() for box in samples)


def _samples(shape: tuple[int, ...]) -> list[Box]:
    """Return some of the first elements of a tensor, and some of the last."""
    budget, size = _ELEMENTS, []
    for n in shape[::-1]:
        size.append(min(n, max(1, budget)))
        budget //= max(1, n)
    counts = tuple(size[::-1])
    ends = tuple(n - count for n, count in zip(shape, counts, strict=True))
    return [Box(start, counts) for start in dict.fromkeys([(0,) * len(shape), ends])]
