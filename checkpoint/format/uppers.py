"""The upper bytes of numbers, sign and upper 7 bits of the exponent, as codes of 4 bits, two in a byte.

Nothing is rotated first: it takes fewer passes than codes of exponents, and gains a little less. How far a
byte is below the highest, modulo 256, is t: d, its lower 7 bits, and s, its upper one. A d of 7 says that the
byte itself is among the others, which follow the codes. Two of them make the byte 16 d + 8 s + 17 d' + 128 s'
modulo 256: what one multiplication of the pair of them gives.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt
from checkpoint.format.frames import compress_by_entropy, decompress
from checkpoint.format.scratch import Scratch

_HEAD = struct.Struct("<BI")  # highest upper byte without its sign, bytes of the frame of codes
_OTHER = 7
_TOGETHER = np.uint16(0x1011)  # t + 256 t', times this: the upper byte of the result is the pair's
_MANY_EQUAL = (
    1 / 160
)  # of all pairs of lower bytes (of noise: 1/256): they or the exponents' lowest bits shrink
_MIN_CODED = 63 / 64  # of the numbers: each other one takes a byte, and the time to find it
_BLOCK = 1 << 16

Plane = NDArray[np.uint8]
Array = NDArray[Any]


def highest_upper(upper: Array) -> int | None:
    """Choose, from a sample of upper halves, the bytes that get codes; None if another way shrinks more."""
    counts = np.bincount(upper.astype(np.uint8), minlength=256)
    if counts.dot(counts) > _MANY_EQUAL * upper.size**2:
        return None
    halves = (upper >> 8).astype(np.uint8) & 0x7F
    highest = int(halves.max())
    if np.count_nonzero(halves > highest - _OTHER) < _MIN_CODED * upper.size:
        coded = np.convolve(np.bincount(halves, minlength=128), np.ones(_OTHER, int))[:128]
        highest = int(coded.argmax())
        if coded[highest] < _MIN_CODED * upper.size:
            return None
    return highest


class UpperCoder:
    """Turns upper bytes into codes, part by part: blocks at most, all but the last of an even length."""

    def __init__(self, highest: int, count: int) -> None:
        self._highest = np.uint8(highest)
        self._pairs = np.empty((count + 1) // 2, np.uint8)
        self._others: list[bytes] = []
        self._at = 0

    def add(self, upper: Array, room: Scratch) -> None:
        """Code the next numbers, of which these are the upper 16 bits."""
        offsets, codes = room.exponents[: upper.size], room.codes[: upper.size]
        np.right_shift(upper, 8, out=offsets, casting="unsafe")
        np.subtract(self._highest, offsets, out=offsets)
        np.bitwise_and(offsets, 0x7F, out=codes)
        places = flagged(np.greater_equal(codes, _OTHER, out=codes.view(np.bool_)))
        if places.size:
            self._others.append((self._highest - offsets[places]).tobytes())
            offsets[places] = _OTHER
        if offsets.size % 2:
            offsets = np.append(offsets, np.uint8(0))
        pairs = offsets.view("<u2")
        pairs *= _TOGETHER
        np.right_shift(pairs, 8, out=self._pairs[self._at : self._at + pairs.size], casting="unsafe")
        self._at += pairs.size

    def body(self) -> list[bytes]:
        """Return the codes, compressed, and the bytes that have none as they are."""
        frame = compress_by_entropy(self._pairs.data)
        return [_HEAD.pack(self._highest, len(frame)), frame, *self._others]


def flagged(flags: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return where flags are set, which few are: most words of eight of them are passed over at once."""
    if flags.size % 8 == 0:
        (words,) = (flags.view("<u8") != 0).nonzero()
        if words.size < flags.size / 64:
            near, at = flags.reshape(-1, 8)[words].nonzero()
            places: NDArray[np.intp] = words[near] * 8 + at
            return places
    return flags.nonzero()[0]


def decode_uppers(body: memoryview, count: int) -> memoryview:
    """Return `count` upper bytes. Raises Corrupt if there is another number of them."""
    highest, length = _HEAD.unpack_from(body) if len(body) >= _HEAD.size else (0, 0)
    others = np.frombuffer(body[_HEAD.size + length :], np.uint8)
    pairs = np.frombuffer(decompress(body[_HEAD.size : _HEAD.size + length], (count + 1) // 2), np.uint8)
    uppers = np.empty(count, np.uint8)
    at = 0
    for first in range(0, count, _BLOCK):
        part = uppers[first : first + _BLOCK]
        offsets = _apart(pairs[first // 2 : (first + _BLOCK) // 2])[: part.size]
        np.subtract(np.uint8(highest), offsets, out=part)
        places = flagged((offsets & 0x7F) == _OTHER)
        if at + places.size > others.size:
            raise Corrupt(f"a plane of upper bytes has only {others.size} of those without a code")
        part[places] = others[at : at + places.size]
        at += places.size
    if at != others.size:
        raise Corrupt(f"a plane of upper bytes has {others.size} of those without a code instead of {at}")
    return uppers.data


def _apart(pairs: Plane) -> Plane:
    """Return the two offsets that each byte was made from."""
    wide = pairs.astype("<u2")
    second = wide & 7
    wide -= second * np.uint16(17)  # what is left, modulo 256: 16 d + 8 s + 128 s'
    second |= wide & 0x80
    second <<= 8
    second |= (wide >> 4) & 7
    wide &= 8
    wide <<= 4
    second |= wide
    return second.view(np.uint8)
