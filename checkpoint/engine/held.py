"""What a host still holds in memory of its last snapshots: a checkpoint that needs no store to be read."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from checkpoint.format.manifest import ChunkRecord, Manifest


@dataclass(frozen=True, slots=True)
class Held:
    """A whole snapshot in a host's memory.

    The chunks are raw (codec RAW) and cover every tensor; a chunk's `offset` counts in `memory`, and its
    `pack` is 0 and means nothing: the manifest names neither packs nor pages.
    """

    manifest: Manifest
    chunks: Sequence[ChunkRecord]
    memory: memoryview


class Memory(Protocol):
    """A host whose memory can be read."""

    def held(self) -> AbstractContextManager[Held | None]:
        """Pin and return the newest snapshot that this host holds whole, until the context is left.

        None if there is none, or if other hosts hold parts of it. Copy what is needed: the memory is lent
        out anew once the context is left.
        """
