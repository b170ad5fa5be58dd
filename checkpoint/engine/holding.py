"""What a host holds in memory, for those who read it: it stays while it is pinned, or guarded."""

from collections.abc import Callable
from threading import Condition

from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.register import Register


class Holding:
    """The held snapshots of a register, under its owner's lock. Thread-safe.

    The owner is to `advance` a snapshot of which something was let go.
    """

    def __init__(
        self,
        register: Register,
        changed: Condition,
        *,
        advance: Callable[[SnapshotEntry], None],
        is_closed: Callable[[], bool],
    ) -> None:
        self._register = register
        self._changed = changed
        self._advance = advance
        self._is_closed = is_closed

    def digested(self) -> list[SnapshotEntry]:
        """List what is held and digested, by generation and then as it was captured."""
        with self._changed:
            return [entry for entry in self._register.held() if entry.image is not None]

    def pin(self, timeout_s: float) -> SnapshotEntry | None:
        """Return the newest snapshot that this host alone holds whole, to stay until `unpin`.

        Waits a while for one that is captured and not digested yet.
        """
        with self._changed:
            self._changed.wait_for(self._is_newest_digested, timeout_s)
            alone = [entry for entry in self.digested() if entry.is_alone]
            return self.pin_again(alone[-1]) if alone else None

    def pin_again(self, entry: SnapshotEntry) -> SnapshotEntry | None:
        """Return a snapshot, to stay until `unpin`, if it is still held."""
        with self._changed:
            if not entry.is_held or entry.image is None:
                return None
            entry.num_readers += 1
            return entry

    def unpin(self, entry: SnapshotEntry) -> None:
        """Let a snapshot go that was pinned."""
        with self._changed:
            entry.num_readers -= 1
            self._advance(entry)

    def guard(self, entry: SnapshotEntry) -> None:
        """Keep a held snapshot although newer ones are held; room for a new one goes before."""
        with self._changed:
            entry.is_guarded = True

    def unguard(self, entry: SnapshotEntry) -> None:
        """Keep a snapshot no longer than others."""
        with self._changed:
            entry.is_guarded = False
            self._advance(entry)

    @property
    def num_only_here(self) -> int:
        """How many snapshots would be lost with this memory: the newest one held, if no store has it."""
        with self._changed:
            return sum(not entry.is_durable for entry in self._register.held()[-1:])

    def _is_newest_digested(self) -> bool:
        held = self._register.held()
        return self._is_closed() or not held or held[-1].image is not None
