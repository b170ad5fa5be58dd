"""Chunks that several ranks read in parts, and prove together: fingerprints of parts add up to the chunk's.

It takes that the parts of all ranks are all of each chunk, once, which is known before anything is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.engine.rows import Sums

_KEY = ("tensor", "begin", "chunk_bytes", "fingerprint")
PART = np.dtype([*((name, "<u8") for name in _KEY), ("num_bytes", "<u8"), ("sum", "<u8")])
Parts = NDArray[Any]


@dataclass(slots=True)
class Pool:
    """What one rank has read of chunks of which other ranks read the rest."""

    parts: list[Parts] = field(default_factory=list)

    def add(self, keys: Sequence[Any], num_bytes: Any, sums: Sums | Sequence[int]) -> None:
        """Add parts. Keys are the chunk's tensor, where it begins there, its size and its fingerprint."""
        found = np.zeros(len(sums), PART)
        for name, column in zip(PART.names or (), (*keys, num_bytes, sums), strict=True):
            found[name] = column
        self.parts.append(found)

    def told(self) -> bytes:
        """Return what the other ranks are told."""
        return b"".join(one.tobytes() for one in self.parts)


def find_unproved(told: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the chunks, as tensor and first byte, of which the ranks' parts are not all, or do not add up.

    Every rank that knows what all were told finds the same.
    """
    parts = np.frombuffer(b"".join(told), PART)
    chunks, places = np.unique(parts[list(_KEY)], return_inverse=True)
    num_bytes, sums = np.zeros((2, len(chunks)), np.uint64)
    np.add.at(num_bytes, places, parts["num_bytes"])
    np.add.at(sums, places, parts["sum"])
    is_bad = (num_bytes != chunks["chunk_bytes"]) | (sums != chunks["fingerprint"])
    return [(int(one["tensor"]), int(one["begin"])) for one in chunks[is_bad]]
