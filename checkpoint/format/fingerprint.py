"""Content fingerprints of tensors: additive over any exact cover, however the tensor is cut.

A tensor's content is the bytes of its elements, row-major, read as little-endian words of 32 bits. The
fingerprint of a region is the sum, modulo 2^64, of each word, as far as it lies in the region, times a weight
that depends only on the word's place in the whole tensor: weight(g) = A(g mod 4096) * B(g div 4096), both
splitmix64 of a fixed sequence, made odd. A changed word changes the sum by (difference * odd) != 0, so a
single changed word never goes unseen; other changes do with a probability near 2^-32 or less. docs/format.md
has the constants and test vectors.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import FormatError
from checkpoint.format import summing
from checkpoint.format.box import Box
from checkpoint.format.codec import Buffer
from checkpoint.format.compiled import find_compiled
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.runs import Runs
from checkpoint.format.weights import BLOCK, MODULUS, WORD_BYTES

__all__ = [
    "MODULUS",
    "Region",
    "fingerprint",
    "fingerprint_many",
    "fingerprint_run",
    "fingerprint_stretches",
    "fingerprinted_by",
    "start_of_run",
]

_BATCH_BYTES = 1 << 18  # of small tensors that are put side by side
_SMALL_BYTES = BLOCK * WORD_BYTES  # tensors that are worth it; they are one block

Bytes = NDArray[np.uint8]
Region = tuple[Buffer, str, Sequence[int], Box]


class Summing(Protocol):
    """What adds up weighted words; bytes come as flat arrays. Thread-safe."""

    def sum_run(self, raw: Bytes, first: int) -> int:
        """Return the fingerprint of bytes that lie side by side in their tensor, from number `first` on."""

    def sum_runs(self, raw: Bytes, runs: Runs) -> int:
        """Return that of several runs, which lie side by side in memory."""

    def sum_stretches(self, raw: Bytes, first: int, num_bytes: int) -> list[int]:
        """Return those of each `num_bytes` of a run; the last stretch may be shorter."""

    def sum_small(self, rows: Bytes) -> list[int]:
        """Return those of many rows, each of which is all of a tensor of one block or less."""


_sums: Summing = find_compiled() or summing


def fingerprint(data: Buffer | NDArray[Any], dtype_name: str, shape: Sequence[int], box: Box) -> int:
    """Return the fingerprint of a region: `data` holds `box` of a tensor of this shape, row by row.

    The memory it needs besides is a few MiB, however large the region.

    Raises FormatError if the data or the box does not fit.
    """
    itemsize = dtype_of(dtype_name).itemsize
    raw = _bytes(data)
    if raw.size != box.numel * itemsize:
        raise FormatError(
            f"{raw.size} bytes are not a box of size {box.size} of {dtype_name} elements "
            f"({box.numel * itemsize} bytes)"
        )
    if box.size == tuple(shape) and not any(box.start):
        return _sums.sum_run(raw, 0)
    box.within(Box.whole(shape))
    if box.is_empty:
        return 0
    runs = Runs.of(shape, box, itemsize)
    return _sums.sum_run(raw, runs.base) if runs.num_bytes == raw.size else _sums.sum_runs(raw, runs)


def fingerprint_many(regions: Sequence[Region]) -> list[int]:
    """Return the fingerprints of many regions; small whole tensors of a size together, which is much faster.

    Raises FormatError if one of them does not fit.
    """
    found = [0] * len(regions)
    alike: dict[int, list[int]] = {}
    for place, (data, dtype_name, shape, box) in enumerate(regions):
        num_bytes = memoryview(data).nbytes
        is_whole = box.size == tuple(shape) and not any(box.start)
        if is_whole and 0 < num_bytes == box.numel * dtype_of(dtype_name).itemsize <= _SMALL_BYTES:
            alike.setdefault(num_bytes, []).append(place)
        else:
            found[place] = fingerprint(data, dtype_name, shape, box)
    for num_bytes, places in alike.items():
        batch = max(1, _BATCH_BYTES // num_bytes)
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            rows = np.frombuffer(b"".join(regions[place][0] for place in some), np.uint8)
            for place, mark in zip(some, _sums.sum_small(rows.reshape(-1, num_bytes)), strict=True):
                found[place] = mark
    return found


def start_of_run(dtype_name: str, shape: Sequence[int], box: Box) -> int | None:
    """Return at which byte of its tensor a box begins, if its elements lie there side by side."""
    itemsize = dtype_of(dtype_name).itemsize
    box.within(Box.whole(shape))
    runs = Runs.of(shape, box, itemsize)
    return runs.base if runs.num_bytes == box.numel * itemsize else None


def fingerprint_run(data: Buffer, first: int) -> int:
    """Return the fingerprint of bytes that lie side by side in their tensor, from byte number `first` on."""
    return _sums.sum_run(_bytes(data), first)


def fingerprint_stretches(data: Buffer, first: int, num_bytes: int) -> list[int]:
    """Return those of each `num_bytes` of such bytes; the last stretch may be shorter."""
    return _sums.sum_stretches(_bytes(data), first, num_bytes)


def fingerprinted_by() -> str:
    """Return what makes fingerprints in this process: "compiled code" or "numpy", which takes longer."""
    return "numpy" if _sums is summing else "compiled code"


def _bytes(data: Buffer | NDArray[Any]) -> Bytes:
    if not isinstance(data, np.ndarray):
        return np.frombuffer(data, np.uint8)
    if not data.flags.c_contiguous:
        raise FormatError("the data of a fingerprint has to be contiguous: copy it first")
    return data.reshape(-1).view(np.uint8)
