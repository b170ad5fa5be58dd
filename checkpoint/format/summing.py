"""The sums of fingerprints in numpy: what all machines can do, and what compiled code is held against."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from checkpoint.format.runs import Runs
from checkpoint.format.weights import (
    BLOCK,
    MODULUS,
    WORD_BYTES,
    Weights,
    constant,
    weight_of_block,
    weights_from,
    weights_in_block,
    weights_of_blocks,
)

_SHIFT = np.uint64(12)
_HALF = np.uint64(32)
_MASK = np.uint64(BLOCK - 1)
_BATCH_BYTES = 1 << 18  # of rows that are worked on at a time: they and their weights fit a core's cache
_LONG_RUN_BYTES = 1 << 16  # from here on a run is worth a call of its own,
_LOOSE_RUN_BYTES = 1 << 13  # and from here on, if every run begins elsewhere in its block
_SEGMENT = 512  # words of a row for which weights are looked up at a time
_HOT_BLOCKS = 128  # worked on at a time: few enough for a cache, and so many that threads seldom meet

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]


def sum_run(raw: Bytes, first: int) -> int:
    """Return the fingerprint of one contiguous run that begins with byte number `first` of the tensor."""
    return _run(raw, first) % MODULUS


def sum_runs(raw: Bytes, runs: Runs) -> int:
    """Return that of several runs, which lie side by side in memory."""
    rows = raw.reshape(-1, runs.num_bytes)
    is_in_step = runs.are_in_step(BLOCK * WORD_BYTES)
    if runs.num_bytes >= (_LONG_RUN_BYTES if is_in_step else _LOOSE_RUN_BYTES):
        return sum(_run(row, first) for row, first in _each_run(rows, runs)) % MODULUS
    return _scattered(rows, runs) % MODULUS


def sum_stretches(raw: Bytes, first: int, num_bytes: int) -> list[int]:
    """Return those of each `num_bytes` of a run; the last stretch may be shorter.

    Takes little longer than that of all bytes: what comes before an edge is that of the blocks before it,
    which are added up once, and of the words since.
    """
    if first % WORD_BYTES or num_bytes % WORD_BYTES or raw.size % WORD_BYTES:
        return [sum_run(raw[at : at + num_bytes], first + at) for at in range(0, raw.size, num_bytes)]
    words, place, step = raw.view("<u4"), first // WORD_BYTES, num_bytes // WORD_BYTES
    head = min(-place % BLOCK, words.size)
    blocks = (words.size - head) // BLOCK
    sums = np.zeros(blocks + 1, np.uint64)
    sums[0] = _words(words[:head], place) % MODULUS
    sums[1:] = _dots(words[head : head + blocks * BLOCK].reshape(blocks, BLOCK))
    sums[1:] *= weights_from((place + head) // BLOCK, blocks)
    before = sums.cumsum().tolist()
    ends = [0]
    for at in np.minimum(range(step, words.size + step, step), words.size).tolist():
        number = (at - head) // BLOCK
        begin = head + number * BLOCK if number >= 0 else 0
        rest = _words(words[begin:at], place + begin) if at > begin else 0
        ends.append(rest + (before[number] if number >= 0 else 0))
    return [(end - begin) % MODULUS for begin, end in pairwise(ends)]


def sum_small(rows: Bytes) -> list[int]:
    """Return those of many rows, each of which is all of a tensor of one block or less."""
    words = _filled_up(rows, 0)
    sums = np.einsum("ij,j->i", words, weights_in_block()[: words.shape[1]]) * np.uint64(weight_of_block(0))
    found: list[int] = sums.tolist()
    return found


def _each_run(rows: Bytes, runs: Runs) -> Iterator[tuple[Bytes, int]]:
    for first in range(0, len(rows), 1024):
        last = min(first + 1024, len(rows))
        yield from zip(rows[first:last], runs.starts(first, last).tolist(), strict=True)


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
            total += bits * int(weights_in_block()[low]) * weight_of_block(high)
    return total


def _words(words: Words, first: int) -> int:
    """Sum whole words, the first of which is number `first`: an integer dot."""
    high, low = divmod(first, BLOCK)
    if low + words.size <= BLOCK:
        inner = words.astype(np.uint64).dot(weights_in_block()[low : low + words.size])
        return int(inner) * weight_of_block(high)
    total, head = 0, -low % BLOCK
    blocks, tail = divmod(words.size - head, BLOCK)
    if head:
        total, high = _words(words[:head], first), high + 1
    if tail:
        total += _words(words[words.size - tail :], (high + blocks) * BLOCK)
    if blocks:
        sums = _dots(words[head : words.size - tail].reshape(blocks, BLOCK))
        total += int(sums.dot(weights_from(high, blocks)))
    return total


def _dots(words: Words) -> Weights:
    """Sum each of some blocks, without their B.

    Neighbours w and v are one number p = w + 2^32 v, and v and the next w are q = v + 2^32 w. So a sum of
    words times weights is one of p and one of q, times others: nothing has to be made wider first. The last
    word of a block has no q.
    """
    pairs = words.view("<u8")
    if not pairs.flags.aligned:
        sums: Weights = np.einsum("ij,j->i", words, weights_in_block())
        return sums
    of_p, of_q = _a_of_pairs()
    sums = words[:, -1] * of_q[-1]
    for first in range(0, len(words), _HOT_BLOCKS):
        p = pairs[first : first + _HOT_BLOCKS]
        shape, strides = (len(p), BLOCK // 2 - 1), (BLOCK * WORD_BYTES, 2 * WORD_BYTES)
        q = np.ndarray(shape, "<u8", words[first:], WORD_BYTES, strides)
        sums[first : first + len(p)] += np.einsum("ij,j->i", p, of_p) + np.einsum("ij,j->i", q, of_q[:-1])
    return sums


def _scattered(rows: Bytes, runs: Runs) -> int:
    """Sum many short runs, a bounded number of bytes at a time."""
    batch = max(1, _BATCH_BYTES // rows.shape[1])
    total = 0
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        starts = runs.starts(first, first + len(part))
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
    inner = np.einsum("ij,j->i", rows[:, :room], weights_in_block()[low : low + room])
    total = int(inner.dot(weights_of_blocks(highs)))
    if room < length:
        beyond = np.einsum("ij,j->i", rows[:, room:], weights_in_block()[: length - room])
        total += int(beyond.dot(weights_of_blocks(highs + np.uint64(1))))
    return total


def _out_of_step(rows: Words, lows: Weights, highs: Weights) -> int:
    """Sum rows of at most `_SEGMENT` words that begin anywhere; a row meets one or two blocks."""
    length = rows.shape[1]
    windows = sliding_window_view(_a_and_nothing(), length)
    total = int(np.einsum("ij,ij->i", rows, windows[lows]).dot(weights_of_blocks(highs)))
    over = lows + np.uint64(length) > BLOCK
    if over.any():
        windows = sliding_window_view(_nothing_and_a(), length)
        begins = lows[over] - np.uint64(BLOCK - _SEGMENT)
        beyond = np.einsum("ij,ij->i", rows[over], windows[begins])
        total += int(beyond.dot(weights_of_blocks(highs[over] + np.uint64(1))))
    return total


@lru_cache(maxsize=1)
def _a_of_pairs() -> tuple[Weights, Weights]:
    """Return what p and q, as above, count for, so that each word counts A in the end.

    The upper words of q = v + 2^32 w are lower words of p, and the other way round; what they add there is
    taken off again. With a and b of a pair: q counts b - 2^32 a, and p counts a - 2^32 times the b before.
    """
    even, odd = weights_in_block()[::2], weights_in_block()[1::2]
    of_p = even.copy()
    of_p[1:] -= odd[:-1] << _HALF
    return constant(of_p), constant(odd - (even << _HALF))


@lru_cache(maxsize=1)
def _a_and_nothing() -> Weights:
    return constant(np.concatenate([weights_in_block(), np.zeros(_SEGMENT, np.uint64)]))


@lru_cache(maxsize=1)
def _nothing_and_a() -> Weights:
    return constant(np.concatenate([np.zeros(_SEGMENT, np.uint64), weights_in_block()]))
