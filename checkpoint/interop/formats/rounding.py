"""Casts between fp32 bits and those of 16 bits, as torch casts: to nearest, ties to even."""

from typing import Any, Final

import numpy as np

from checkpoint.interop.formats.contract import Array

ROUNDED: Final = ("bfloat16", "float16", "float32")
_QUIET: Final = 0x40
_INFINITE: Final = 0x7F800000
_AT_A_TIME: Final = 1 << 16  # words: they and their room fit a core's cache

_Words = np.ndarray[Any, np.dtype[np.uint32]]


def round_bits(bits: Array, dtype: str) -> Array:
    """Return fp32 values, given and returned as bits, in another dtype of `ROUNDED`."""
    words: _Words = bits.view(np.uint32)
    if dtype == "float32":
        return words
    if dtype == "float16":
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            return words.view(np.float32).astype(np.float16).view(np.uint16)
    flat, found = words.reshape(-1), np.empty(words.size, np.uint16)
    room = np.empty(min(_AT_A_TIME, words.size), np.uint32)
    for first in range(0, words.size, _AT_A_TIME):
        some = flat[first : first + _AT_A_TIME]
        found[first : first + _AT_A_TIME] = _upper_halves(some, room[: some.size])
    return found.reshape(words.shape)


def _upper_halves(words: _Words, room: _Words) -> _Words:
    """Return the rounded upper halves of fp32 words, in `room`."""
    np.bitwise_and(words, 0x7FFFFFFF, out=room)
    has_nan = room.max() > _INFINITE
    np.right_shift(words, 16, out=room)
    np.bitwise_and(room, 1, out=room)
    np.add(room, 0x7FFF, out=room)
    np.add(room, words, out=room)
    np.right_shift(room, 16, out=room)
    if has_nan:
        np.copyto(room, (words >> 16) | _QUIET, where=(words & 0x7FFFFFFF) > _INFINITE)
    return room


def widen_bits(bits: Array, dtype: str) -> Array:
    """Return the bits of fp32 values that are equal to these of a dtype of `ROUNDED`."""
    if dtype == "float32":
        return bits
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32).view(np.uint32)
    return bits.astype(np.uint32) << 16
