"""Exponents as codes of 4 bits, two in a byte: entropy coding takes a time per byte, and so takes half of it.

code 0 to 13    the exponent `highest` - code
code 14         any other exponent: they follow the codes, one byte each
code 15         the exponent 0
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt
from checkpoint.format.frames import compress_by_entropy, decompress
from checkpoint.format.scratch import Scratch
from checkpoint.format.uppers import flagged, take_bytes

_HEAD = struct.Struct("<BI")  # highest exponent, bytes of the frame of codes
_SPAN, _OTHER, _ZERO = 14, 14, 15
_MAX_OTHERS = 1 / 16  # of the exponents: each of them takes a byte
_MANY = 1 / 32  # of the exponents: to find them one by one takes longer than another pass
_TOGETHER = np.uint16(0x110)  # c + 256 c', times this: the upper byte of the result is c + 16 c'
_BLOCK = 1 << 16

Plane = NDArray[np.uint8]


def highest_exponent(few: Plane) -> int | None:
    """Choose, from a sample, the exponents that get codes; None if too many would be left over."""
    counts = np.bincount(few, minlength=256)
    coded = np.convolve(counts, np.ones(_SPAN, int))[:256]  # of the exponents i - 13 to i
    coded[_SPAN:] += counts[0]
    highest = int(coded.argmax())
    return highest if coded[highest] >= (1 - _MAX_OTHERS) * few.size else None


class ExponentCoder:
    """Turns exponents into codes, part by part, each a block at most; all but the last of an even length."""

    def __init__(self, highest: int, count: int, room: Scratch) -> None:
        self._highest = np.uint8(highest)
        self._flags = room.flags
        self._pairs = room.packed((count + 1) // 2)
        self._others: list[bytes] = []
        self._at = 0

    def add(self, exponents: Plane) -> None:
        """Code the next ones, which are not needed afterwards."""
        beyond = self._flags[: exponents.size].view(np.bool_)
        codes = np.subtract(self._highest, exponents, out=exponents)
        np.greater_equal(codes, _SPAN, out=beyond)
        if np.count_nonzero(beyond) > _MANY * codes.size and (zero := codes == self._highest).any():
            zero &= beyond
            beyond ^= zero
            codes += zero * np.uint8((_ZERO - int(self._highest)) % 256)  # faster than to copy to some
        places = flagged(beyond.view(np.uint8))
        if places.size:
            self._others.append((self._highest - codes[places]).tobytes())
            codes[places] = _OTHER
        if codes.size % 2:
            codes = np.append(codes, np.uint8(0))
        pairs = codes.view("<u2")
        pairs *= _TOGETHER
        take_bytes(pairs, 1, self._pairs[self._at : self._at + pairs.size])
        self._at += pairs.size

    def body(self) -> list[bytes]:
        """Return the codes, compressed, and the exponents that have none as they are."""
        frame = compress_by_entropy(self._pairs.data)
        return [_HEAD.pack(self._highest, len(frame)), frame, *self._others]


def decode_exponents(body: memoryview, count: int) -> memoryview:
    """Return `count` exponents. Raises Corrupt if there is another number of them."""
    highest, length = _HEAD.unpack_from(body) if len(body) >= _HEAD.size else (0, 0)
    others = body[_HEAD.size + length :]
    pairs = np.frombuffer(decompress(body[_HEAD.size : _HEAD.size + length], (count + 1) // 2), np.uint8)
    exponents = np.empty(count, np.uint8)
    at = 0
    for first in range(0, count, _BLOCK):
        part: NDArray[Any] = exponents[first : first + _BLOCK]
        wide = pairs[first // 2 : (first + _BLOCK) // 2].astype("<u2")
        wide |= wide << 4
        wide &= 0x0F0F
        codes = wide.view(np.uint8)[: part.size]
        np.subtract(np.uint8(highest), codes, out=part)
        beyond = codes >= _SPAN
        if beyond.any():
            places = np.flatnonzero(codes == _OTHER)
            if at + len(places) > len(others):
                raise Corrupt(f"a plane of exponents has only {len(others)} of those without a code")
            part[places] = np.frombuffer(others[at : at + len(places)], np.uint8)
            at += len(places)
            np.copyto(part, 0, where=codes == _ZERO)
    if at != len(others):
        raise Corrupt(f"a plane of exponents has {len(others)} of those without a code instead of {at}")
    return exponents.data
