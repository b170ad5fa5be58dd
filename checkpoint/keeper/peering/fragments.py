"""The fragments that a host keeps: rows of its own snapshots, where they lie, and parity, within a budget."""

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from checkpoint.errors import PeerLost
from checkpoint.keeper.peering.shelf import Volume
from checkpoint.redundancy.peers import Peers, Place
from checkpoint.store.contract import Buffer, parts_of

_ENTRY_BYTES = 256  # what a fragment costs besides its bytes, about


@dataclass(frozen=True, slots=True)
class _Lent:
    """A row of a snapshot of one's own: its buffers, some of which are the snapshot itself."""

    buffers: tuple[Buffer, ...]
    volume: Volume


class Fragments:
    """Fragments by name. Thread-safe; those that were put take `budget_bytes` at most."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._kept: dict[str, bytes | _Lent] = {}
        self.num_bytes = 0
        self.most_bytes = 0

    def put(self, name: str, data: Sequence[Buffer]) -> None:
        """Keep a copy, in place of what is there. Raises PeerLost if the budget has no room for it."""
        value = b"".join(data)
        with self._changed:
            self._forget([name])
            num_bytes = self.num_bytes + len(value) + _ENTRY_BYTES
            if num_bytes > self.budget_bytes:
                raise PeerLost(
                    f"its memory for parity is full ({self.num_bytes} of {self.budget_bytes} bytes): "
                    "raise parity's `budget_mib` to 2 x losses / (group size - losses) of a host's share"
                )
            self._kept[name] = value
            self.num_bytes = num_bytes
            self.most_bytes = max(self.most_bytes, num_bytes)
            self._changed.notify_all()

    def lend(self, name: str, data: Sequence[Buffer], volume: Volume) -> None:
        """Show a row of a snapshot that is held, for as long as that is."""
        with self._changed:
            self._forget([name])
            self._kept[name] = _Lent(tuple(data), volume)
            self._changed.notify_all()

    def fetch(self, name: str) -> Sequence[Buffer] | None:
        """Return a fragment as it lies there; None if it is not there, or its snapshot had to make room.

        Nothing keeps a snapshot from making room while it is being read, so that no reader holds a capture
        up: what changes on the way is found by the fragment's digest, like any other damage.
        """
        with self._changed:
            kept = self._kept.get(name)
        if kept is None or isinstance(kept, bytes):
            return None if kept is None else (kept,)
        return kept.buffers if kept.volume.entry.is_held else None

    def keys(self, prefix: str) -> list[str]:
        """List names."""
        with self._changed:
            return sorted(name for name in self._kept if name.startswith(prefix))

    def drop(self, prefix: str) -> None:
        """Forget fragments."""
        with self._changed:
            self._forget([name for name in self._kept if name.startswith(prefix)])

    def await_any(self, wanted: Callable[[Collection[str]], bool], timeout_s: float) -> bool:
        """Wait until the names that are kept are as wanted; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: wanted(self._kept.keys()), timeout_s)

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            gone = self._kept.pop(name, None)
            if isinstance(gone, bytes):
                self.num_bytes -= len(gone) + _ENTRY_BYTES


class OwnPeers:
    """The port to peers' memories, as a keeper has it: its own fragments are at hand."""

    def __init__(self, host: str, fragments: Fragments, others: Peers, volume: Volume | None = None) -> None:
        """With a `volume` what is put on this host are rows of that snapshot: they are lent, not copied."""
        self._host = host
        self._own = fragments
        self._others = others
        self._volume = volume

    def put(self, place: Place, data: Sequence[Buffer]) -> None:
        """Keep the buffers' bytes."""
        if place.peer != self._host:
            self._others.put(place, data)
        elif self._volume is not None:
            self._own.lend(place.name, parts_of(list(data)), self._volume)
        else:
            self._own.put(place.name, data)

    def fetch(self, places: Sequence[Place]) -> list[Buffer | None]:
        """Return what is there."""
        elsewhere = [place for place in places if place.peer != self._host]
        found = dict(zip(elsewhere, self._others.fetch(elsewhere), strict=True))
        return [self._at_hand(one) if one.peer == self._host else found[one] for one in places]

    def _at_hand(self, place: Place) -> Buffer | None:
        found = self._own.fetch(place.name)
        return None if found is None else b"".join(found)

    def keys(self, peer: str, prefix: str) -> list[str]:
        """List names."""
        return self._own.keys(prefix) if peer == self._host else self._others.keys(peer, prefix)

    def drop(self, peer: str, prefix: str) -> None:
        """Forget fragments."""
        if peer == self._host:
            self._own.drop(prefix)
        else:
            self._others.drop(peer, prefix)
