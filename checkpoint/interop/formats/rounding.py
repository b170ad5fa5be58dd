"""Casts between fp32 bits and those of 16 bits, as torch casts: to nearest, ties to even."""

from typing import Any, Final

import numpy as np

from checkpoint.interop.formats.contract import Array

ROUNDED: Final = ("bfloat16", "float16", "float32")
_QUIET: Final = 0x40


def round_bits(bits: Array, dtype: str) -> Array:
    """Return fp32 values, given and returned as bits, in another dtype of `ROUNDED`."""
    words: np.ndarray[Any, np.dtype[np.uint32]] = bits.view(np.uint32)
    if dtype == "float32":
        return words
    if dtype == "float16":
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            return words.view(np.float32).astype(np.float16).view(np.uint16)
    rounded = (words + (0x7FFF + ((words >> 16) & 1)).astype(np.uint32)) >> 16
    is_nan = (words & 0x7FFFFFFF) > 0x7F800000
    kept = np.where(is_nan, (words >> 16) | _QUIET, rounded)
    return kept.astype(np.uint16)


def widen_bits(bits: Array, dtype: str) -> Array:
    """Return the bits of fp32 values that are equal to these of a dtype of `ROUNDED`."""
    if dtype == "float32":
        return bits
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32).view(np.uint32)
    return bits.astype(np.uint32) << 16
