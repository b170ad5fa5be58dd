"""Rows of files into memory, and their fingerprints, in compiled code: what is read is proved in the cache.

The library is a plain one, without Python in it: _reading.c. Where it is missing, stores and numpy do it.
"""

import ctypes
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.format.compiled import address_of, weight_tables
from checkpoint.format.fingerprint import fingerprinted_by

_LIBRARY = "checkpoint.engine._reading"
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint64

# Rows of one length: where the first lies in its file, in memory and in its tensor, and how far the next is.
_FIELDS = "descriptor offset step address stride first pitch num_rows row_bytes"
LOT = np.dtype([(name, "<i8") for name in _FIELDS.split()])
Lots = NDArray[Any]
Sums = NDArray[np.uint64]
Flags = NDArray[np.bool_]


class RowReader:
    """Reads lots of rows with the library; other threads run meanwhile."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._tables = [address_of(table) for table in weight_tables()]
        self._read = library.holdfast_read_rows
        self._read.argtypes = [_POINTER, _NUMBER, *[_POINTER] * 4]
        self._read.restype = None

    def read(self, lots: Lots) -> tuple[Sums, Flags]:
        """Read them; return the fingerprint of each lot, and whether all of it was there.

        The memory they go to has to be there for as long as that takes.
        """
        sums, is_read = np.zeros(len(lots), np.uint64), np.zeros(len(lots), np.bool_)
        lots = np.ascontiguousarray(lots)
        self._read(address_of(lots), len(lots), *self._tables, address_of(sums), address_of(is_read))
        return sums, is_read


@lru_cache(maxsize=1)
def find_reader() -> RowReader | None:
    """Return the reader, if the library was built and this machine's compiled fingerprints are right."""
    spec = find_spec(_LIBRARY)
    if spec is None or spec.origin is None or sys.byteorder != "little" or fingerprinted_by() == "numpy":
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        fields = ctypes.c_char_p.in_dll(library, "holdfast_row_fields").value
        return RowReader(library) if fields == _FIELDS.encode() else None
    except (OSError, AttributeError, ValueError):  # of another machine, or of other sources
        return None
