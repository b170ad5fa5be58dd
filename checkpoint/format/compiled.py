"""The sums of fingerprints in compiled code, where a C compiler was at hand when Holdfast was installed.

The library is a plain one, without Python in it: _fingerprint.c. Where it is missing, numpy does the work.
"""

import ctypes
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.format import summing
from checkpoint.format.runs import Runs
from checkpoint.format.weights import BLOCK, MODULUS, WORD_BYTES, Weights, weights_in_block

_LIBRARY = "checkpoint.format._fingerprint"
_BATCH_RUNS = 1 << 16  # whose starts and sums are listed at a time
_LINE_BYTES = 64
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint64

Bytes = NDArray[np.uint8]


class Compiled:
    """Sums made by the library; other threads run meanwhile."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._tables = [address_of(table) for table in weight_tables()]
        self._run, self._rows = library.holdfast_sum_run, library.holdfast_sum_rows
        self._run.argtypes = [_POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER]
        self._run.restype = _NUMBER
        self._rows.argtypes = [_POINTER, _NUMBER, _NUMBER, *[_POINTER] * 4]
        self._rows.restype = None

    def sum_run(self, raw: Bytes, first: int) -> int:
        """Return the fingerprint of one run."""
        found: int = self._run(address_of(raw), raw.size, first, *self._tables)
        return found

    def sum_runs(self, raw: Bytes, runs: Runs) -> int:
        """Return that of several runs."""
        rows = raw.reshape(-1, runs.num_bytes)
        total = 0
        for first in range(0, len(rows), _BATCH_RUNS):
            part = rows[first : first + _BATCH_RUNS]
            sums = self._sums(part, runs.starts(first, first + len(part)))
            total += int(sums.sum(dtype=np.uint64))
        return total % MODULUS

    def sum_stretches(self, raw: Bytes, first: int, num_bytes: int) -> list[int]:
        """Return those of each `num_bytes` of a run."""
        end = raw.size - raw.size % num_bytes
        rows = raw[:end].reshape(-1, num_bytes)
        firsts = np.arange(len(rows), dtype=np.uint64) * np.uint64(num_bytes) + np.uint64(first)
        found: list[int] = self._sums(rows, firsts).tolist()
        return found if end == raw.size else [*found, self.sum_run(raw[end:], first + end)]

    def sum_small(self, rows: Bytes) -> list[int]:
        """Return those of rows that are all of their tensors."""
        found: list[int] = self._sums(rows, np.zeros(len(rows), np.uint64)).tolist()
        return found

    def _sums(self, rows: Bytes, firsts: Weights) -> Weights:
        sums = np.empty(len(rows), np.uint64)
        num_bytes = rows.shape[1]
        self._rows(
            address_of(rows), len(rows), num_bytes, address_of(firsts), *self._tables, address_of(sums)
        )
        return sums


def find_compiled() -> Compiled | None:
    """Return sums in compiled code, if the library was built."""
    spec = find_spec(_LIBRARY)
    return None if spec is None or spec.origin is None else load_compiled(spec.origin)


def load_compiled(path: str) -> Compiled | None:
    """Return the sums of a library; None if it is of no use here, or gives others than numpy."""
    if sys.byteorder != "little":
        return None
    try:
        compiled = Compiled(ctypes.CDLL(path))
    except (OSError, AttributeError):  # of another machine, or of other sources
        return None
    return compiled if _agrees(compiled) else None


def _agrees(compiled: Compiled) -> bool:
    """Whether it gives what numpy does, of bytes that begin and end within words, in so many blocks."""
    raw = (np.arange(8 * BLOCK * WORD_BYTES, dtype=np.uint32) * np.uint32(0x9E3779B1) >> 24).astype(np.uint8)
    first = BLOCK * WORD_BYTES - 1001
    return compiled.sum_run(raw, first) == summing.sum_run(raw, first)


@lru_cache(maxsize=1)
def weight_tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the lower and the upper halves of the weights A, as compiled code takes them."""
    weights = weights_in_block()
    return _aligned(weights.astype(np.uint32)), _aligned((weights >> np.uint64(32)).astype(np.uint32))


def _aligned(table: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return a copy that begins where a line of the processor's cache does: most loads are of tables."""
    room = np.empty(table.nbytes + _LINE_BYTES, np.uint8)
    copy = room[-address_of(room) % _LINE_BYTES :][: table.nbytes].view(np.uint32)
    copy[:] = table
    return copy


def address_of(array: NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    found: int = array.__array_interface__["data"][0]  # in a fraction of the time of `ctypes.data`
    return found
