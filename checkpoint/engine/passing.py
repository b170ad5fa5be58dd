"""Chunks that do not lie in their targets as they are stored: through a little memory, row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint.engine.targets import Target
from checkpoint.format.codec import Buffer
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.layout import Box
from checkpoint.format.scratch import lend


@dataclass(frozen=True, slots=True)
class Share:
    """What a target takes of a chunk."""

    target: Target
    box: Box


def pass_rows(
    dtype: str, box: Box, first: int, *, piece_bytes: int, shares: Sequence[Share]
) -> Iterator[memoryview]:
    """Yield memory for a chunk, piece by piece, and put what each was filled with to where it belongs.

    A piece has whole rows of the first dim that has several. The chunk's box begins at byte `first` of its
    tensor, and its elements lie there side by side; pieces end near multiples of their size there, where
    blocks of fingerprints do.
    """
    dim = next((number for number, size in enumerate(box.size) if size > 1), 0)
    row_bytes = box.numel * dtype_of(dtype).itemsize // box.size[dim]
    room = lend(max(piece_bytes, row_bytes))
    done = 0
    while done < box.size[dim]:
        near = piece_bytes - (first + done * row_bytes) % piece_bytes
        count = min(max(near // row_bytes, 1), box.size[dim] - done)
        piece = room[: count * row_bytes]
        yield piece
        put_rows(dtype, _rows(box, dim, done, count), piece, shares)
        done += count


def put_rows(dtype: str, box: Box, raw: Buffer, shares: Sequence[Share]) -> None:
    """Copy what targets take of a box to where it belongs."""
    values = np.frombuffer(raw, dtype_of(dtype).carrier).reshape(box.size)
    for share in shares:
        part = share.box.intersect(box)
        if part is not None:
            share.target.put(part.start, values[part.within(box)])


def _rows(box: Box, dim: int, first: int, count: int) -> Box:
    start, size = list(box.start), list(box.size)
    start[dim] += first
    size[dim] = count
    return Box(tuple(start), tuple(size))
