"""Tells an optimizer's fp32 masters from others': a weight is its master, rounded, whenever a step is done.

Names, shapes and counts agree where states lie under another parameter's name, or at another place of a flat
buffer. Contents do not.
"""

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.interop.formats.rounding import ROUNDED, round_bits

_MASTER = "optimizer.master."
_MAX_COMPARED = 64  # masters, evenly among all: each takes two requests
_ELEMENTS = 1024


def check_masters(opened: ForeignCheckpoint, where: str) -> None:
    """See that samples of masters, rounded, are their weights. Raises Corrupt naming one that is not."""
    numbers = {(tensor.name, *tensor.at.items()): number for number, tensor in enumerate(opened.tensors)}
    pairs = []
    for number, tensor in enumerate(opened.tensors):
        weight = numbers.get((tensor.name.removeprefix(_MASTER), *tensor.at.items()))
        is_master = tensor.name.startswith(_MASTER) and tensor.dtype == "float32"
        if is_master and weight is not None and opened.tensors[weight].dtype in ROUNDED:
            pairs.append((number, weight))
    for number, weight in pairs[:: -(-len(pairs) // _MAX_COMPARED) or 1]:
        master, rounded = opened.tensors[number], opened.tensors[weight]
        for box in _samples(master.shape):
            made = round_bits(opened.read(number, box), rounded.dtype)
            if master.shape != rounded.shape or (made != opened.read(weight, box)).any():
                raise Corrupt(
                    f"{where}: {master} is not what {rounded} was rounded from: the optimizer's states lie "
                    "under others' names, or are of another step, and its moments are not believed either"
                )


def _samples(shape: tuple[int, ...]) -> list[Box]:
    """Return some of the first elements of a tensor, and some of the last."""
    budget, size = _ELEMENTS, []
    for n in shape[::-1]:
        size.append(min(n, max(1, budget)))
        budget //= max(1, n)
    counts = tuple(size[::-1])
    ends = tuple(n - count for n, count in zip(shape, counts, strict=True))
    return [Box(start, counts) for start in dict.fromkeys([(0,) * len(shape), ends])]
