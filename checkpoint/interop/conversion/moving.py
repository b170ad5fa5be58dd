"""Sub-boxes of moves: which elements of a foreign tensor are which of a global one, both ways. Pure."""

from collections.abc import Sequence

import numpy as np

from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.conversion.contract import Array
from checkpoint.interop.moves import Move


def source_part(move: Move, part: Box) -> Box:
    """Return where a part of a move's target box lies in the foreign tensor."""
    start, size = list(move.source_box.start), list(move.source_box.size)
    for dim, target_dim in _matched(move):
        start[dim] += part.start[target_dim] - move.target_box.start[target_dim]
        size[dim] = part.size[target_dim]
    return Box(tuple(start), tuple(size))


def target_part(move: Move, part: Box) -> Box:
    """Return where a part of a move's source box lies in the global tensor."""
    start, size = list(move.target_box.start), list(move.target_box.size)
    for dim, target_dim in _matched(move):
        start[target_dim] += part.start[dim] - move.source_box.start[dim]
        size[target_dim] = part.size[dim]
    return Box(tuple(start), tuple(size))


def turned(move: Move, bits: Array, part: Box) -> Array:
    """Return a part of the foreign tensor as the part of the global one that it is."""
    return np.ascontiguousarray(bits.transpose(_order(move))).reshape(part.size)


def turned_back(move: Move, bits: Array, part: Box) -> Array:
    """Return a part of the global tensor as the part of the foreign one that it is."""
    order = _order(move)
    turned_size = [part.size[dim] for dim in order]
    back = [order.index(dim) for dim in range(len(order))]
    return bits.reshape(turned_size).transpose(back)


def is_turned(move: Move) -> bool:
    """Whether a move's dims have another order in the foreign tensor than in the global one."""
    pairs = _matched(move)
    return pairs != sorted(pairs)


def _order(move: Move) -> Sequence[int]:
    """Return a move's transposition; that of a single number has none."""
    num_dims = len(move.source_box.size)
    return move.order if len(move.order) == num_dims else range(num_dims)


def _matched(move: Move) -> list[tuple[int, int]]:
    """Pair the foreign dims with the global ones; those of one element are paired with nothing."""
    order = _order(move)
    here = [dim for dim in order if move.source_box.size[dim] != 1]
    there = [dim for dim, size in enumerate(move.target_box.size) if size != 1]
    if [move.source_box.size[dim] for dim in here] != [move.target_box.size[dim] for dim in there]:
        raise Mismatch(
            f"a move does not come out: {move.source_box} is not {move.target_box} in another order"
        )
    return list(zip(here, there, strict=True))
