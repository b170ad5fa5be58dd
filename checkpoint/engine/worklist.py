"""What is to be worked on next: announced chunks, older snapshots first, in the order of their places.

Not thread-safe: its owner holds a lock around every call.
"""

import heapq
from collections.abc import Sequence
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
    """A heap of batches of chunks, and of snapshots' ends."""

    def __init__(self) -> None:
        self._heap: list[tuple[SnapshotId, int, tuple[int, ...], int]] = []

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, entry: SnapshotEntry, rank: int, chunks: Sequence[int]) -> None:
        """Put chunks of a rank's share on the list."""
        slots = entry.shares[rank].plan.slots
        first = num_bytes = 0
        for place, chunk in enumerate(chunks):
            added = slots[chunk].num_bytes
            if num_bytes + added > _BATCH_BYTES and place > first:
                heapq.heappush(self._heap, (entry.id, rank, tuple(chunks[first:place]), num_bytes))
                first, num_bytes = place, 0
            num_bytes += added
        heapq.heappush(self._heap, (entry.id, rank, tuple(chunks[first:]), num_bytes))

    def add_end(self, entry: SnapshotEntry) -> None:
        """Put a snapshot's end on the list, behind all of its chunks."""
        heapq.heappush(self._heap, (entry.id, _END, (), 0))

    def take(self) -> tuple[SnapshotId, int | None, tuple[int, ...]]:
        """Take the first batch, and small ones that follow it: a snapshot's id, the rank whose share it is of
        and the chunks; no rank at its end."""
        id_, rank, chunks, num_bytes = heapq.heappop(self._heap)
        while self._heap and self._heap[0][:2] == (id_, rank) and rank != _END:
            num_bytes += self._heap[0][3]
            if num_bytes > _BATCH_BYTES:
                break
            chunks += heapq.heappop(self._heap)[2]
        return id_, None if rank == _END else rank, chunks
