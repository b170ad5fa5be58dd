"""The upper bytes of numbers, sign and upper 7 bits of the exponent, as codes: several of them in a byte.

Nothing is rotated first: it takes fewer passes than codes of exponents, and gains a little less. How far a
byte is below the highest, modulo 256, is t. Where that is too far, a patch follows: the place and the byte.

Pairs of neighbours    t = d + 128 s with d < 8, in a byte 16 d + 8 s + 17 d' + 128 s' modulo 256, which is
                       what one multiplication of both t gives.
Triples of one sign    t < 6, in a byte t + 6 t' + 36 t'' for numbers a third of them all apart. Fewer bytes
                       take less time; and the more is in each, the less do they repeat by chance, which
                       zstandard would look into, and gain nothing.
"""

import struct
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt
from checkpoint.format.frames import compress_by_entropy, decompress
from checkpoint.format.scratch import Scratch

_HEAD = struct.Struct("<BI")  # highest upper byte, bytes of the frame of codes
_SIGN = 0x80
_PATCH_BYTES = 5
_SPAN_OF_PAIRS, _SPAN_OF_TRIPLES = 8, 6  # so many values has a code
_TOGETHER = np.uint16(0x1011)  # t + 256 t', times this: the upper byte of the result is the pair's
_MANY_EQUAL = (
    1 / 160
)  # of pairs of lower bytes (of noise: 1/256): they, or the exponents' lowest bits, shrink
_MAX_PATCHES = {
    8: 1 / 128,
    6: 1 / 256,
}  # of the numbers, by span: each takes 5 bytes, and the time to find it
_BLOCK = 1 << 16

Plane = NDArray[np.uint8]
Array = NDArray[Any]


class Packing(Enum):
    """How codes make a byte, by how many do."""

    PAIRS = 2
    TRIPLES = 3


def choose_packing(upper: Array) -> tuple[Packing, int] | None:
    """Choose, from a sample of upper halves, codes and the highest byte; None if another way shrinks more."""
    equal = np.bincount(upper.astype(np.uint8), minlength=256)
    if equal.dot(equal) > _MANY_EQUAL * upper.size**2:
        return None
    uppers = upper >> 8
    if uppers.max() < _SIGN and (highest := _highest(uppers, _SPAN_OF_TRIPLES)) is not None:
        return Packing.TRIPLES, highest
    uppers &= _SIGN - 1
    highest = _highest(uppers, _SPAN_OF_PAIRS)
    return None if highest is None else (Packing.PAIRS, highest)


def _highest(uppers: Array, span: int) -> int | None:
    """Return the highest of the `span` bytes that get codes, the highest of all if that will do."""
    least = (1 - _MAX_PATCHES[span]) * uppers.size
    highest = int(uppers.max())
    if np.count_nonzero(uppers > highest - span) < least:
        coded = np.bincount(uppers, minlength=_SIGN).cumsum()
        coded[span:] -= coded[:-span].copy()
        highest = int(coded.argmax())
        if coded[highest] < least:
            return None
    return highest


class UpperCoder:
    """Turns upper bytes into codes, part by part: blocks at most, all but the last of an even length."""

    def __init__(self, packing: Packing, highest: int, count: int, room: Scratch) -> None:
        self._packing = packing
        self._highest = np.uint8(highest)
        self._flags = room.flags
        self._codes = room.packed(-(-count // packing.value))
        self._places: list[bytes] = []
        self._others: list[bytes] = []
        self._at = 0

    def add(self, uppers: Plane) -> None:
        """Code the next ones, which are not needed afterwards."""
        offsets, flags = np.subtract(self._highest, uppers, out=uppers), self._flags[: uppers.size]
        if self._packing is Packing.PAIRS:
            np.bitwise_and(offsets, _SIGN - _SPAN_OF_PAIRS, out=flags)
        else:
            np.greater_equal(offsets, _SPAN_OF_TRIPLES, out=flags.view(np.bool_))
        places = flagged(flags)
        if places.size:
            self._others.append((self._highest - offsets[places]).tobytes())
            self._places.append((places + self._at).astype("<u4").tobytes())
            offsets[places] = 0
        (self._add_pairs if self._packing is Packing.PAIRS else self._add_triples)(offsets)
        self._at += offsets.size

    def body(self) -> list[bytes]:
        """Return the codes, compressed, and the patches."""
        frame = compress_by_entropy(self._codes.data)
        return [_HEAD.pack(self._highest, len(frame)), frame, *self._places, *self._others]

    def _add_pairs(self, offsets: Plane) -> None:
        if offsets.size % 2:
            offsets = np.append(offsets, np.uint8(0))
        pairs = offsets.view("<u2")
        pairs *= _TOGETHER
        first = self._at // 2
        take_bytes(pairs, 1, self._codes[first : first + pairs.size])

    def _add_triples(self, offsets: Plane) -> None:
        first = 0
        while first < offsets.size:
            digit, place = divmod(self._at + first, self._codes.size)
            part = offsets[first : first + self._codes.size - place]
            codes = self._codes[place : place + part.size]
            if digit:
                part *= np.uint8(_SPAN_OF_TRIPLES**digit)
                codes += part
            else:
                codes[:] = part
            first += part.size


def take_bytes(numbers: Array, at: int, into: Array) -> None:
    """Take the bytes of numbers from `at` on, as many as there is room for.

    In the same memory seen `at` bytes further on they come first; the rest is cut off: faster than a shift.
    """
    if at:
        into[-1] = numbers[-1] >> (8 * at)  # which would reach beyond the end
        into = into[:-1]
        numbers = np.ndarray(into.size, numbers.dtype, numbers.data, at)
    np.copyto(into, numbers, casting="unsafe")


def flagged(flags: Plane) -> NDArray[np.intp]:
    """Return which bytes are not 0, which few are: most words of eight of them are passed over at once."""
    if flags.size % 8 == 0:
        words = flags.view("<u8")
        hits = (words != 0).nonzero()[0]
        if hits.size < flags.size / 64:
            near = (words[hits].view(np.uint8) != 0).nonzero()[0]
            places: NDArray[np.intp] = (hits[near >> 3] << 3) + (near & 7)
            return places
    return flags.nonzero()[0]


def decode_uppers(body: memoryview, count: int, packing: Packing) -> memoryview:
    """Return `count` upper bytes. Raises Corrupt if there is another number of them, or a patch elsewhere."""
    highest, length = _HEAD.unpack_from(body) if len(body) >= _HEAD.size else (0, 0)
    end = _HEAD.size + length
    num_codes = -(-count // packing.value)
    codes = np.frombuffer(decompress(body[_HEAD.size : end], num_codes), np.uint8)
    uppers = np.empty(num_codes * packing.value, np.uint8)
    if packing is Packing.PAIRS:
        for first in range(0, num_codes, _BLOCK):
            uppers[2 * first : 2 * (first + _BLOCK)] = _apart(codes[first : first + _BLOCK])
    else:
        span = np.uint8(_SPAN_OF_TRIPLES)
        for part in uppers.reshape(packing.value, num_codes):
            above = codes // span
            np.multiply(above, span, out=part)
            np.subtract(codes, part, out=part)
            codes = above
    uppers = uppers[:count]
    np.subtract(np.uint8(highest), uppers, out=uppers)
    _patch(uppers, body[end:])
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


def _patch(uppers: Plane, patches: memoryview) -> None:
    num, rest = divmod(len(patches), _PATCH_BYTES)
    if rest or num > uppers.size:
        raise Corrupt(f"{len(patches)} bytes cannot be the patches of {uppers.size} upper bytes")
    places = np.frombuffer(patches[: 4 * num], "<u4")
    if num and (places[-1] >= uppers.size or (places[1:] <= places[:-1]).any()):
        raise Corrupt(f"the patches of {uppers.size} upper bytes are out of order, or beyond them")
    uppers[places] = np.frombuffer(patches[4 * num :], np.uint8)
