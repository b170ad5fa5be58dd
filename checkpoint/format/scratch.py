"""Memory for a block of numbers, kept from chunk to chunk: fresh pages would take longer than the work."""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 19  # numbers: as few steps as what they need still fits a core's cache
_SMALLEST_KEPT = 256 << 10  # bytes: malloc is as fast with less
_MOST_KEPT = 4
_PACKED_BYTES = 1 << 20  # codes of all numbers of a chunk, two in a byte


def _bytes() -> NDArray[np.uint8]:
    return np.empty(BLOCK, np.uint8)


def _halves() -> NDArray[Any]:
    return np.empty(BLOCK, "<u2")


@dataclass(frozen=True, slots=True)
class Scratch:
    """Room for intermediate results of BLOCK numbers."""

    upper: NDArray[Any] = field(default_factory=_halves)
    rotated: NDArray[Any] = field(default_factory=_halves)
    signs: NDArray[Any] = field(default_factory=_halves)
    bytes: NDArray[np.uint8] = field(default_factory=_bytes)
    flags: NDArray[np.uint8] = field(default_factory=_bytes)
    codes: NDArray[np.uint8] = field(default_factory=lambda: np.empty(_PACKED_BYTES, np.uint8))

    def packed(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return room for the codes of as many numbers as there are."""
        return self.codes[:num_bytes] if num_bytes <= _PACKED_BYTES else np.empty(num_bytes, np.uint8)


_kept: deque[NDArray[np.uint8]] = deque(maxlen=_MOST_KEPT)
_idle: deque[Scratch] = deque()  # as many as were ever in use at once; taken and given back atomically


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Lend some, which nobody else uses meanwhile."""
    try:
        lent = _idle.pop()
    except IndexError:
        lent = Scratch()
    try:
        yield lent
    finally:
        _idle.append(lent)


def lend(num_bytes: int) -> memoryview:
    """Return memory that is lent again once nothing refers to it any more.

    It is at most a quarter larger than was asked for: thousands of small chunks may be held at once.
    """
    if num_bytes < _SMALLEST_KEPT:
        return np.empty(num_bytes, np.uint8).data
    kept = _fitting(num_bytes)
    if kept is None:
        kept = np.empty(num_bytes, np.uint8)
    lent = kept[:num_bytes]
    weakref.finalize(lent, _kept.append, kept).atexit = False
    return lent.data  # whoever has a part of it has `lent`


def _fitting(num_bytes: int) -> NDArray[np.uint8] | None:
    for _ in range(_MOST_KEPT):
        try:
            kept = _kept.pop()
        except IndexError:  # asked for, not looked for: another thread may take the last one in between
            return None
        if num_bytes <= kept.size <= num_bytes + num_bytes // 4:
            return kept
        _kept.appendleft(kept)
    return None
