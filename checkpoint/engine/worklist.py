"""What is to be worked on next: announced chunks, older snapshots first, in the order of their places.

Not thread-safe: its owner holds a lock around every call.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoint.engine.ledger import ShareEntry, SnapshotEntry, SnapshotId

_BATCH_BYTES = 1 << 20  # smaller chunks are worked on together
_END = 1 << 62  # sorts a snapshot's end behind all of its chunks


@dataclass(frozen=True, slots=True)
class Work:
    """Digest these chunks of a share, and pack them. Without a share: all of the snapshot was handed out."""

    entry: SnapshotEntry
    share: ShareEntry | None
    chunks: tuple[int, ...] = ()


class Worklist:
    """A heap of chunks and of snapshots' ends."""

    def __init__(self) -> None:
        self._heap: list[tuple[SnapshotId, int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, entry: SnapshotEntry, rank: int, chunks: Iterable[int]) -> None:
        """Put chunks of a rank's share on the list."""
        for chunk in chunks:
            heapq.heappush(self._heap, (entry.id, rank, chunk))

    def add_end(self, entry: SnapshotEntry) -> None:
        """Put a snapshot's end on the list, behind all of its chunks."""
        heapq.heappush(self._heap, (entry.id, _END, _END))

    def take(self) -> tuple[SnapshotId, int | None, int]:
        """Take the first item: a snapshot's id, the rank whose share it is of and the chunk; no rank at its
        end."""
        id_, rank, chunk = heapq.heappop(self._heap)
        return id_, None if rank == _END else rank, chunk

    def take_along(self, id_: SnapshotId, rank: int, first: int, share: ShareEntry) -> tuple[int, ...]:
        """Take the small chunks that follow the first one as well; return them all."""
        chunks = [first]
        num_bytes = share.plan.slots[first].num_bytes
        while self._heap and self._heap[0][:2] == (id_, rank):
            num_bytes += share.plan.slots[self._heap[0][2]].num_bytes
            if num_bytes > _BATCH_BYTES:
                break
            chunks.append(heapq.heappop(self._heap)[2])
        return tuple(chunks)
