"""Finds a rank's file that is a copy of another's: it fits in its place, and every size agrees."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.deepspeed_files import RankFile
from checkpoint.interop.formats.extents import read_box
from checkpoint.interop.place import Place

_SAMPLE = 1024  # elements at the beginning, in the middle and at the end of a partition


def check_distinct(
    place: Place, files: Sequence[RankFile], flats: Mapping[str, Sequence[Sequence[Any]]]
) -> None:
    """See that no two ranks hold the same moments and fp32 parameters. Raises Corrupt naming the two files.

    Samples are compared: that two ranks agree in all of them, and not because they are all one value, has no
    other explanation.
    """
    if len(files) < 2:
        return
    seen: dict[bytes, RankFile] = {}
    for number, file in enumerate(files):
        mark = _mark(place, file, [flat for parts in flats.values() for flat in parts[number]])
        if mark is not None and mark in seen:
            raise Corrupt(
                f"{file.path} and {seen[mark].path} hold the same: one is a copy of the other, and what rank "
                f"{file.data} had is not there"
            )
        if mark is not None:
            seen[mark] = file


def _mark(place: Place, file: RankFile, flats: Sequence[Any]) -> bytes | None:
    """Return a digest of a rank's samples; None if they are all one value."""
    digest, values = hashlib.blake2b(digest_size=16), set[bytes]()
    for flat in flats:
        if not isinstance(flat, Stored) or len(flat.shape) != 1:
            continue
        size = flat.shape[0]
        digest.update(size.to_bytes(8, "little"))
        for first in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
            count = min(_SAMPLE, size - first)
            data = read_box(place, file.archive.locate(flat), Box((first,), (count,)))
            digest.update(data.tobytes())
            values |= {each.tobytes() for each in data[:4]}
    return digest.digest() if len(values) > 2 else None
