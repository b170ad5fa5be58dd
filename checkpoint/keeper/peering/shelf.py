"""The snapshots that a host holds, as values that peers may read: found by generation and step."""

import threading
from dataclasses import dataclass

from checkpoint.engine.intake import Intake
from checkpoint.engine.ledger import SnapshotEntry, SnapshotId
from checkpoint.keeper.peering.shares import body_of, encode_head, share_of
from checkpoint.redundancy.parts import Parts


@dataclass(frozen=True, slots=True)
class Volume:
    """A held snapshot: the head of this host's share, and head and body as one value, where they lie."""

    entry: SnapshotEntry
    head: bytes
    value: Parts


class Shelf:
    """What an intake holds. Thread-safe; what is read of a volume is sure only while it is pinned."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self._memory = intake.arena.memory.toreadonly()
        self._lock = threading.Lock()
        self._volumes: dict[SnapshotId, Volume] = {}

    def entries(self) -> dict[SnapshotId, SnapshotEntry]:
        """Return what is held and digested, oldest first."""
        return {entry.id: entry for entry in self.intake.holding.digested()}

    def volume(self, id_: SnapshotId) -> Volume | None:
        """Return a snapshot that is held, described once; None if it is not."""
        entries = self.entries()
        with self._lock:
            for gone in self._volumes.keys() - entries.keys():
                del self._volumes[gone]
            if id_ in entries and id_ not in self._volumes:
                head = encode_head(share_of(entries[id_]))
                value = Parts([head, *body_of(entries[id_], self._memory)])
                self._volumes[id_] = Volume(entries[id_], head, value)
            return self._volumes.get(id_)

    def pin(self, id_: SnapshotId) -> Volume | None:
        """Return a snapshot that is held, to stay as it is until `unpin`."""
        volume = self.volume(id_)
        if volume is None or self.intake.holding.pin_again(volume.entry) is None:
            return None
        return volume

    def unpin(self, volume: Volume) -> None:
        """Let a pinned snapshot go."""
        self.intake.holding.unpin(volume.entry)
