"""Memory for a block of numbers, kept from chunk to chunk: fresh pages would take longer than the work."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 19  # numbers: as few steps as what they need still fits a core's cache


class Scratch(NamedTuple):
    """Room for intermediate results of BLOCK numbers."""

    upper: NDArray[Any]
    rotated: NDArray[Any]
    exponents: NDArray[np.uint8]
    codes: NDArray[np.uint8]
    beyond: NDArray[np.bool_]
    pairs: NDArray[Any]


_idle: deque[Scratch] = deque()  # as many as were ever in use at once; taken and given back atomically


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Lend some, which nobody else uses meanwhile."""
    try:
        lent = _idle.pop()
    except IndexError:
        lent = Scratch(
            np.empty(BLOCK, "<u2"),
            np.empty(BLOCK, "<u2"),
            np.empty(BLOCK, np.uint8),
            np.empty(BLOCK, np.uint8),
            np.empty(BLOCK, np.bool_),
            np.empty(BLOCK // 2, "<u2"),
        )
    try:
        yield lent
    finally:
        _idle.append(lent)
