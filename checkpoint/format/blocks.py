"""Blocks: what is known of the parts of a chunk, so that some can be read, and proved, without the rest.

Behind a chunk that is stored as it is lie the fingerprints of its blocks. They add up to its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoint.format.box import Box
from checkpoint.format.codec import Buffer
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.fingerprint import (
    Region,
    fingerprint_many,
    fingerprint_stretches,
    start_of_run,
)

BLOCK_BYTES = 128 << 10
SUM_BYTES = 8
_SUM = np.dtype("<u8")

Sums = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a chunk is cut: along `dim`, into `count` blocks of `width` rows each; the last may have fewer.

    The dims before `dim` have one element each, so that blocks lie side by side in the chunk's bytes.
    """

    dim: int
    width: int
    count: int
    row_bytes: int

    @property
    def sums_bytes(self) -> int:
        """How many bytes lie behind the chunk's own."""
        return self.count * SUM_BYTES

    def box(self, chunk: Box, first: int, last: int) -> Box:
        """Return the box of some blocks of a chunk, `last` exclusive."""
        start, size = list(chunk.start), list(chunk.size)
        start[self.dim] += first * self.width
        size[self.dim] = min(last * self.width, chunk.size[self.dim]) - first * self.width
        return Box(tuple(start), tuple(size))


def blocks_of(dtype: str, shape: Sequence[int], box: Box) -> Blocks | None:
    """Return how a chunk of a box of a tensor is cut.

    None if it is no more than one block, or if it is scattered over its tensor, where sums would cost much.
    """
    num_bytes = box.numel * dtype_of(dtype).itemsize
    if num_bytes <= BLOCK_BYTES or start_of_run(dtype, shape, box) is None:
        return None
    dim = next(number for number, size in enumerate(box.size) if size > 1)
    row_bytes = num_bytes // box.size[dim]
    width = max(1, BLOCK_BYTES // row_bytes)
    count = math.ceil(box.size[dim] / width)
    return Blocks(dim, width, count, row_bytes) if count > 1 else None


def sums_of(raw: Buffer, dtype: str, shape: Sequence[int], box: Box) -> bytes:
    """Return what is to lie behind a chunk stored as it is: the fingerprints of its blocks, in order."""
    if memoryview(raw).nbytes <= BLOCK_BYTES:
        return b""
    blocks, first = blocks_of(dtype, shape, box), start_of_run(dtype, shape, box)
    if blocks is None or first is None:
        return b""
    return np.array(fingerprint_stretches(raw, first, blocks.width * blocks.row_bytes), _SUM).tobytes()


def digest_many(regions: Sequence[Region]) -> list[tuple[int, bytes]]:
    """Return the fingerprint of each of many regions, and those of its blocks."""
    sums = [sums_of(*region) for region in regions]
    small = iter(fingerprint_many([region for region, found in zip(regions, sums, strict=True) if not found]))
    return [(total_of(read_sums(found)) if found else next(small), found) for found in sums]


def read_sums(data: Buffer) -> Sums:
    """Return the fingerprints of blocks, as `sums_of` wrote them."""
    return np.frombuffer(data, _SUM)


def total_of(sums: Sums) -> int:
    """Return what fingerprints of blocks add up to: that of their chunk."""
    return int(sums.sum(dtype=np.uint64))
