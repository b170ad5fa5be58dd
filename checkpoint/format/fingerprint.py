"""Content fingerprints of tensors: additive over any exact cover, however the tensor is cut.

A tensor's content is the bytes of its elements, row-major, read as little-endian words of 32 bits. The
fingerprint of a region is the sum, modulo 2^64, of each word, as far as it lies in the region, times a weight
that depends only on the word's place in the whole tensor: weight(g) = A(g mod 4096) * B(g div 4096), both
splitmix64 of a fixed sequence, made odd. A changed word changes the sum by (difference * odd) != 0, so a
single changed word never goes unseen; other changes do with a probability near 2^-32 or less. docs/format.md
has the constants and test vectors.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from checkpoint.errors import FormatError
from checkpoint.format.box import Box
from checkpoint.format.codec import Buffer
from checkpoint.format.dtypes import dtype_of

MODULUS = 1 << 64
BLOCK = 4096  # words that share one B
WORD_BYTES = 4
Region = tuple[Buffer, str, Sequence[int], Box]

_SHIFT = np.uint64(12)
_HALF = np.uint64(32)
_MASK = np.uint64(BLOCK - 1)
_C1 = 0x486F6C6466617374  # "Holdfast"
_C2 = 0x636865636B707431  # "checkpt1"
_BATCH_BYTES = 1 << 18  # of rows that are worked on at a time: they and their weights fit a core's cache
_LONG_RUN_BYTES = 1 << 16  # from here on a run is worth a call of its own,
_LOOSE_RUN_BYTES = 1 << 13  # and from here on, if every run begins elsewhere in its block
_SMALL_BYTES = BLOCK * WORD_BYTES  # tensors that are worth to be put side by side; they are one block
_SEGMENT = 512  # words of a row for which weights are looked up at a time
_HOT_BLOCKS = 128  # worked on at a time: few enough for a cache, and so many that threads seldom meet
_NUM_KNOWN_B = 1 << 16  # those of the first GiB are looked up

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Weights = NDArray[np.uint64]


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
        return _run(raw, 0) % MODULUS
    box.within(Box.whole(shape))
    if box.is_empty:
        return 0
    outer, run = _runs(shape, box, itemsize)
    if run == raw.size:
        return _run(raw, outer.base) % MODULUS
    rows = raw.reshape(-1, run)
    if run >= (_LONG_RUN_BYTES if outer.is_in_step else _LOOSE_RUN_BYTES):
        return sum(_run(row, first) for row, first in _each_run(rows, outer)) % MODULUS
    return _scattered(rows, outer) % MODULUS


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
            for place, mark in zip(some, _from_the_start(rows.reshape(-1, num_bytes)), strict=True):
                found[place] = mark
    return found


def start_of_run(dtype_name: str, shape: Sequence[int], box: Box) -> int | None:
    """Return at which byte of its tensor a box begins, if its elements lie there side by side."""
    itemsize = dtype_of(dtype_name).itemsize
    box.within(Box.whole(shape))
    outer, run = _runs(shape, box, itemsize)
    return outer.base if run == box.numel * itemsize else None


def fingerprint_run(data: Buffer, first: int) -> int:
    """Return the fingerprint of bytes that lie side by side in their tensor, from byte number `first` on."""
    return _run(_bytes(data), first) % MODULUS


def fingerprint_stretches(data: Buffer, first: int, num_bytes: int) -> list[int]:
    """Return those of each `num_bytes` of such bytes; the last stretch may be shorter.

    Takes little longer than that of all bytes: what comes before an edge is that of the blocks before it,
    which are added up once, and of the words since.
    """
    raw = _bytes(data)
    if first % WORD_BYTES or num_bytes % WORD_BYTES or raw.size % WORD_BYTES:
        return [
            fingerprint_run(raw[at : at + num_bytes].data, first + at) for at in range(0, raw.size, num_bytes)
        ]
    words, place, step = raw.view("<u4"), first // WORD_BYTES, num_bytes // WORD_BYTES
    head = min(-place % BLOCK, words.size)
    blocks = (words.size - head) // BLOCK
    sums = np.zeros(blocks + 1, np.uint64)
    sums[0] = _words(words[:head], place) % MODULUS
    sums[1:] = _dots(words[head : head + blocks * BLOCK].reshape(blocks, BLOCK))
    sums[1:] *= _b_from((place + head) // BLOCK, blocks)
    before = sums.cumsum().tolist()
    ends = [0]
    for at in np.minimum(range(step, words.size + step, step), words.size).tolist():
        number = (at - head) // BLOCK
        begin = head + number * BLOCK if number >= 0 else 0
        rest = _words(words[begin:at], place + begin) if at > begin else 0
        ends.append(rest + (before[number] if number >= 0 else 0))
    return [(end - begin) % MODULUS for begin, end in pairwise(ends)]


def _bytes(data: Buffer | NDArray[Any]) -> Bytes:
    if not isinstance(data, np.ndarray):
        return np.frombuffer(data, np.uint8)
    if not data.flags.c_contiguous:
        raise FormatError("the data of a fingerprint has to be contiguous: copy it first")
    return data.reshape(-1).view(np.uint8)


class _Outer:
    """Where each contiguous run of a box begins in the tensor, in bytes, without ever listing all of them."""

    __slots__ = ("base", "sizes", "strides")

    def __init__(self, base: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.base, self.sizes, self.strides = base, sizes, strides

    @property
    def is_in_step(self) -> bool:
        """Whether all runs begin at the same place of a block."""
        return all(stride % (BLOCK * WORD_BYTES) == 0 for stride in self.strides)

    def starts(self, first: int, last: int) -> Weights:
        """Return the starts of the runs number `first` to `last`, exclusive."""
        if len(self.sizes) == 1:
            numbers = np.arange(first, last, dtype=np.uint64)
            return numbers * np.uint64(self.strides[0]) + np.uint64(self.base)
        rest = np.arange(first, last, dtype=np.uint64)
        starts = np.full(last - first, self.base, np.uint64)
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            rest, coordinate = np.divmod(rest, np.uint64(size))
            starts += coordinate * np.uint64(stride)
        return starts


def _runs(shape: Sequence[int], box: Box, itemsize: int) -> tuple[_Outer, int]:
    """Split a box into the dims that step from run to run, and the length of a run in bytes."""
    strides = [itemsize * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dim = len(shape)
    while dim and box.size[dim - 1] == shape[dim - 1]:
        dim -= 1
    dim = max(0, dim - 1)  # the first dim that is not whole is still contiguous
    run = itemsize * math.prod(box.size[dim:])
    base = sum(a * stride for a, stride in zip(box.start, strides, strict=True))
    return _Outer(base, box.size[:dim], tuple(strides[:dim])), run


def _each_run(rows: Bytes, outer: _Outer) -> Iterator[tuple[Bytes, int]]:
    for first in range(0, len(rows), 1024):
        last = min(first + 1024, len(rows))
        yield from zip(rows[first:last], outer.starts(first, last).tolist(), strict=True)


def _run(raw: Bytes, first: int) -> int:
    """Sum one contiguous run that begins with byte number `first` of the tensor."""
    if first % WORD_BYTES == 0 and raw.size % WORD_BYTES == 0:
        return _words(raw.view("<u4"), first // WORD_BYTES)
    head = min(-first % WORD_BYTES, raw.size)
    end = raw.size - (raw.size - head) % WORD_BYTES
    total = _words(raw[head:end].view("<u4"), (first + head) // WORD_BYTES)
    for part, at in ((raw[:head], first), (raw[end:], first + end)):  # words that only partly lie in the run
        if part.size:
            bits = int.from_bytes(part.tobytes(), "little") << 8 * (at % WORD_BYTES)
            low, high = at // WORD_BYTES % BLOCK, at // WORD_BYTES // BLOCK
            total += bits * int(_a()[low]) * _b_of(high)
    return total


def _words(words: Words, first: int) -> int:
    """Sum whole words, the first of which is number `first`: an integer dot."""
    high, low = divmod(first, BLOCK)
    if low + words.size <= BLOCK:
        return int(words.astype(np.uint64).dot(_a()[low : low + words.size])) * _b_of(high)
    total, head = 0, -low % BLOCK
    blocks, tail = divmod(words.size - head, BLOCK)
    if head:
        total, high = _words(words[:head], first), high + 1
    if tail:
        total += _words(words[words.size - tail :], (high + blocks) * BLOCK)
    if blocks:
        inner = _dots(words[head : words.size - tail].reshape(blocks, BLOCK))
        total += int(inner.dot(_b_from(high, blocks)))
    return total


def _dots(words: Words) -> Weights:
    """Sum each of some blocks, without their B.

    Neighbours w and v are one number p = w + 2^32 v, and v and the next w are q = v + 2^32 w. So a sum of
    words times weights is one of p and one of q, times others: nothing has to be made wider first. The last
    word of a block has no q.
    """
    pairs = words.view("<u8")
    if not pairs.flags.aligned:
        sums: Weights = np.einsum("ij,j->i", words, _a())
        return sums
    of_p, of_q = _a_of_pairs()
    sums = words[:, -1] * of_q[-1]
    for first in range(0, len(words), _HOT_BLOCKS):
        p = pairs[first : first + _HOT_BLOCKS]
        shape, strides = (len(p), BLOCK // 2 - 1), (BLOCK * WORD_BYTES, 2 * WORD_BYTES)
        q = np.ndarray(shape, "<u8", words[first:], WORD_BYTES, strides)
        sums[first : first + len(p)] += np.einsum("ij,j->i", p, of_p) + np.einsum("ij,j->i", q, of_q[:-1])
    return sums


def _from_the_start(rows: Bytes) -> list[int]:
    """Sum each of many rows that are all of the first block of their tensors."""
    words = _filled_up(rows, 0)
    sums: list[int] = (np.einsum("ij,j->i", words, _a()[: words.shape[1]]) * np.uint64(_b_of(0))).tolist()
    return sums


def _scattered(rows: Bytes, outer: _Outer) -> int:
    """Sum many short runs, a bounded number of bytes at a time."""
    batch = max(1, _BATCH_BYTES // rows.shape[1])
    total = 0
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        starts = outer.starts(first, first + len(part))
        phases = starts & np.uint64(WORD_BYTES - 1)
        places = starts >> np.uint64(2)
        for phase in np.unique(phases).tolist():
            here = slice(None) if (phases == phase).all() else phases == phase
            total += _placed(_filled_up(part[here], phase), places[here])
    return total


def _filled_up(rows: Bytes, phase: int) -> Words:
    """Return each row as words, the first of which has `phase` bytes before the row's own."""
    if phase == 0 and rows.shape[1] % WORD_BYTES == 0:
        return rows.view("<u4")
    length = phase + rows.shape[1]
    wide = np.zeros((len(rows), length + -length % WORD_BYTES), np.uint8)
    wide[:, phase:length] = rows
    return wide.view("<u4")


def _placed(rows: Words, places: Weights) -> int:
    """Sum rows of words, each of which begins at a place of its own."""
    total = 0
    lows = places & _MASK
    width = BLOCK if (lows == lows[0]).all() else _SEGMENT
    for begin in range(0, rows.shape[1], width):
        part = rows[:, begin : begin + width]
        at = places + np.uint64(begin)
        total += (_in_step if width == BLOCK else _out_of_step)(part, at & _MASK, at >> _SHIFT)
    return total


def _in_step(rows: Words, lows: Weights, highs: Weights) -> int:
    """Sum rows that all begin at the same place of a block, as in tensors 4096 words wide: they share A."""
    low, length = int(lows[0]), rows.shape[1]
    room = min(length, BLOCK - low)
    inner = np.einsum("ij,j->i", rows[:, :room], _a()[low : low + room])
    total = int(inner.dot(_b(highs)))
    if room < length:
        beyond = np.einsum("ij,j->i", rows[:, room:], _a()[: length - room])
        total += int(beyond.dot(_b(highs + np.uint64(1))))
    return total


def _out_of_step(rows: Words, lows: Weights, highs: Weights) -> int:
    """Sum rows of at most `_SEGMENT` words that begin anywhere; a row meets one or two blocks."""
    length = rows.shape[1]
    windows = sliding_window_view(_a_and_nothing(), length)
    total = int(np.einsum("ij,ij->i", rows, windows[lows]).dot(_b(highs)))
    over = lows + np.uint64(length) > BLOCK
    if over.any():
        windows = sliding_window_view(_nothing_and_a(), length)
        begins = lows[over] - np.uint64(BLOCK - _SEGMENT)
        total += int(np.einsum("ij,ij->i", rows[over], windows[begins]).dot(_b(highs[over] + np.uint64(1))))
    return total


@lru_cache(maxsize=1)
def _a() -> Weights:
    return _constant(_splitmix64(np.arange(BLOCK, dtype=np.uint64), _C1))


@lru_cache(maxsize=1)
def _a_of_pairs() -> tuple[Weights, Weights]:
    """Return what p and q, as above, count for, so that each word counts A in the end.

    The upper words of q = v + 2^32 w are lower words of p, and the other way round; what they add there is
    taken off again. With a and b of a pair: q counts b - 2^32 a, and p counts a - 2^32 times the b before.
    """
    even, odd = _a()[::2], _a()[1::2]
    of_p = even.copy()
    of_p[1:] -= odd[:-1] << _HALF
    return _constant(of_p), _constant(odd - (even << _HALF))


@lru_cache(maxsize=1)
def _a_and_nothing() -> Weights:
    return _constant(np.concatenate([_a(), np.zeros(_SEGMENT, np.uint64)]))


@lru_cache(maxsize=1)
def _nothing_and_a() -> Weights:
    return _constant(np.concatenate([np.zeros(_SEGMENT, np.uint64), _a()]))


def _constant(table: Weights) -> Weights:
    table.setflags(write=False)
    return table


@lru_cache(maxsize=1)
def _known_b() -> Weights:
    return _constant(_b(np.arange(_NUM_KNOWN_B, dtype=np.uint64)))


def _b_from(high: int, num_blocks: int) -> Weights:
    """Return B of some blocks, one after the other."""
    if high + num_blocks <= _NUM_KNOWN_B:
        return _known_b()[high : high + num_blocks]
    return _b(np.arange(high, high + num_blocks, dtype=np.uint64))


@lru_cache(maxsize=1024)
def _b_of(high: int) -> int:
    return int(_b(np.array([high], np.uint64))[0])


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
