"""Content fingerprints of tensors: additive over any exact cover, however the tensor is cut.

The fingerprint of a region is the sum, modulo 2^64, of every word's bits times a weight that depends only on
the word's place in the whole tensor: weight(g) = A(g mod 4096) * B(g div 4096), both splitmix64 of a fixed
sequence, made odd. A changed word changes the sum by (difference * odd) != 0, so a single changed word never
goes unseen; other changes do with a probability near 2^-32 or less. docs/format.md has the constants and test
vectors.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import FormatError
from checkpoint.format.codec import Buffer
from checkpoint.format.dtypes import DType, dtype_of
from checkpoint.format.layout import Box

MODULUS = 1 << 64
BLOCK = 4096  # words that share one B
_SHIFT = np.uint64(12)
_MASK = np.uint64(BLOCK - 1)
_C1 = 0x486F6C6466617374  # "Holdfast"
_C2 = 0x636865636B707431  # "checkpt1"
_BATCH_WORDS = 1 << 18  # how many weights are ever made at a time
_LONG_RUN_WORDS = 16 * BLOCK  # from here on a run is worth a call of its own

Words = NDArray[Any]
Weights = NDArray[np.uint64]


def fingerprint(data: Buffer | NDArray[Any], dtype_name: str, shape: Sequence[int], box: Box) -> int:
    """Return the fingerprint of a region: `data` holds `box` of a tensor of this shape, row by row.

    The memory it needs besides is a few MiB, however large the region.

    Raises FormatError if the data or the box does not fit.
    """
    dtype = dtype_of(dtype_name)
    words = _words(data, dtype)
    if words.size != box.numel * dtype.words:
        raise FormatError(
            f"{words.nbytes} bytes are not a box of size {box.size} of {dtype_name} elements "
            f"({box.numel * dtype.itemsize} bytes)"
        )
    box.within(Box.whole(shape))
    if box.is_empty:
        return 0
    outer, run = _runs(shape, box, dtype.words)
    rows = words.reshape(-1, run)
    if run >= _LONG_RUN_WORDS or len(rows) == 1:
        return sum(_run(row, int(first)) for row, first in _each_run(rows, outer)) % MODULUS
    return _scattered(rows, outer)


def _words(data: Buffer | NDArray[Any], dtype: DType) -> Words:
    """View the bytes as a flat array of little-endian words."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise FormatError("the data of a fingerprint has to be contiguous: copy it first")
        raw = data.reshape(-1).view(np.uint8)
    else:
        raw = np.frombuffer(data, np.uint8)
    if raw.size % dtype.itemsize:
        raise FormatError(f"{raw.size} bytes are no whole number of {dtype.name} elements")
    return raw.view(dtype.word)


class _Outer:
    """Where each contiguous run of a box begins in the tensor, in words, without ever listing all of them."""

    __slots__ = ("base", "sizes", "strides")

    def __init__(self, base: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.base, self.sizes, self.strides = base, sizes, strides

    def starts(self, first: int, last: int) -> Weights:
        """Return the starts of the runs number `first` to `last`, exclusive."""
        rest = np.arange(first, last, dtype=np.uint64)
        starts = np.full(last - first, self.base, np.uint64)
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            rest, coordinate = np.divmod(rest, np.uint64(size))
            starts += coordinate * np.uint64(stride)
        return starts


def _runs(shape: Sequence[int], box: Box, words: int) -> tuple[_Outer, int]:
    """Split a box into the dims that step from run to run, and the length of a run in words."""
    strides = [words * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dim = len(shape)
    while dim and box.size[dim - 1] == shape[dim - 1]:
        dim -= 1
    dim = max(0, dim - 1)  # the first dim that is not whole is still contiguous
    run = words * math.prod(box.size[dim:])
    base = sum(a * stride for a, stride in zip(box.start, strides, strict=True))
    return _Outer(base, box.size[:dim], tuple(strides[:dim])), run


def _each_run(rows: Words, outer: _Outer) -> Any:
    for first in range(0, len(rows), 1024):
        last = min(first + 1024, len(rows))
        yield from zip(rows[first:last], outer.starts(first, last), strict=True)


def _run(words: Words, first: int) -> int:
    """Sum one contiguous run whose first word has the global index `first`: an integer dot."""
    head = min(-first % BLOCK, words.size)
    blocks, tail = divmod(words.size - head, BLOCK)
    total = _part(words[:head], first) + _part(words[words.size - tail :], first + words.size - tail)
    if blocks:
        inner = np.einsum("ij,j->i", words[head : head + blocks * BLOCK].reshape(blocks, BLOCK), _a())
        high = (first + head) // BLOCK
        total += int(np.dot(inner, _b(np.arange(high, high + blocks, dtype=np.uint64))))
    return total


def _part(words: Words, first: int) -> int:
    """Sum words that lie within one block."""
    if not words.size:
        return 0
    low, high = first % BLOCK, first // BLOCK
    inner = int(np.dot(words.astype(np.uint64), _a()[low : low + words.size]))
    return inner * int(_b(np.array([high], np.uint64))[0])


def _scattered(rows: Words, outer: _Outer) -> int:
    """Sum many short runs, a bounded number of words at a time."""
    run = rows.shape[1]
    batch = max(1, _BATCH_WORDS // run)
    total = 0
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        starts = outer.starts(first, first + len(part))
        lows = starts & _MASK
        total += _in_step(part, starts) if (lows == lows[0]).all() else _out_of_step(part, starts)
    return total % MODULUS


def _in_step(rows: Words, starts: Weights) -> int:
    """Sum runs that all begin at the same place of a block, as in tensors 4096 words wide: they share A."""
    run = rows.shape[1]
    low, high = int(starts[0]) % BLOCK, starts >> _SHIFT
    total, begin = 0, 0
    while begin < run:
        end = min(run, begin + BLOCK - low)
        inner = np.einsum("ij,j->i", rows[:, begin:end], _a()[low : low + end - begin])
        total += int(np.dot(inner, _b(high)))
        begin, low, high = end, 0, high + np.uint64(1)
    return total


def _out_of_step(rows: Words, starts: Weights) -> int:
    """Sum runs that begin anywhere, with a weight made for every word."""
    offsets: Weights = np.arange(rows.shape[1], dtype=np.uint64)
    places = starts[:, None] + offsets
    weights = _a()[(places & _MASK).astype(np.intp)]
    weights *= _b(places >> _SHIFT)
    weights *= rows
    return int(weights.sum(dtype=np.uint64))


@lru_cache(maxsize=1)
def _a() -> Weights:
    table = _splitmix64(np.arange(BLOCK, dtype=np.uint64), _C1)
    table.setflags(write=False)
    return table


def _b(high: Weights) -> Weights:
    return _splitmix64(high, _C2)


def _splitmix64(index: Weights, offset: int) -> Weights:
    """Return splitmix64(index + offset) | 1 (Steele, Lea, Flood 2014), modulo 2^64."""
    z = index + np.uint64(offset)
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Weights = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return result
