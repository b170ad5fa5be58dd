"""Finds a rank's file that is a copy of another's: it fits in its place, and every size agrees."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Archive, Stored
from checkpoint.interop.formats.extents import read_box
from checkpoint.interop.place import Place

_ELEMENTS = 1024  # at the beginning, in the middle and at the end of a tensor
_TENSORS = 32  # of a file, evenly among them


@dataclass(frozen=True, slots=True)
class Samples:
    """A rank's file, and those of its tensors of which each rank has a part of its own."""

    path: str
    archive: Archive
    tensors: Sequence[Stored]


def check_distinct(place: Place, files: Sequence[Samples]) -> None:
    """See that no two ranks' files hold the same. Raises Corrupt naming the two.

    Samples are compared: that two ranks agree in all of them, and not because they are all one value, has no
    other explanation.
    """
    seen: dict[bytes, str] = {}
    for file in files if len(files) > 1 else ():
        mark = _mark(place, file)
        if mark is not None and mark in seen:
            raise Corrupt(
                f"{file.path} and {seen[mark]} hold the same: one is a copy of the other, and what its rank "
                "had is not there"
            )
        if mark is not None:
            seen[mark] = file.path


def _mark(place: Place, file: Samples) -> bytes | None:
    """Return a digest of a file's samples; None if they are all one value."""
    digest, values = hashlib.blake2b(digest_size=16), set[bytes]()
    stored = [each for each in file.tensors if each.shape and 0 not in each.shape]
    for each in stored[:: max(1, len(stored) // _TENSORS)]:
        digest.update(repr(each.shape).encode())
        extent, rows = file.archive.locate(each), each.shape[0]
        count = min(rows, max(1, _ELEMENTS // math.prod(each.shape[1:])))
        for first in sorted({0, (rows - count) // 2, rows - count}):
            size = (count, *(min(n, _ELEMENTS) for n in each.shape[1:]))
            data = read_box(place, extent, Box((first, *(0 for _ in size[1:])), size))
            digest.update(data.tobytes())
            values |= {one.tobytes() for one in data.reshape(-1)[:4]}
    return digest.digest() if len(values) > 2 else None
