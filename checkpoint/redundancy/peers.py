"""The port to peers' memories, and one that is within this process, for tests and rehearsals."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from checkpoint.errors import PeerLost
from checkpoint.store.contract import Buffer


@dataclass(frozen=True, slots=True)
class Place:
    """A named fragment in the memory of a peer."""

    peer: str
    name: str


class Peers(Protocol):
    """Fragments by name in the memories of hosts, one's own among them.

    Blocking, thread-safe; a put is whole or absent.
    """

    def put(self, place: Place, data: Sequence[Buffer]) -> None:
        """Keep the buffers' bytes, one after the other, in place of what is there. Raises PeerLost.

        On one's own host the buffers themselves may be kept: whoever puts them leaves them as they are.
        """

    def fetch(self, places: Sequence[Place]) -> list[Buffer | None]:
        """Return what is at each of the places; None where it is not there, or its peer cannot be reached."""

    def keys(self, peer: str, prefix: str) -> list[str]:
        """List the names that a peer keeps and that begin with the prefix. Raises PeerLost."""

    def drop(self, peer: str, prefix: str) -> None:
        """Forget every fragment whose name begins with the prefix. Raises PeerLost."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Memory for some bytes of a fragment, from an offset on."""

    place: Place
    offset: int
    memory: memoryview


@runtime_checkable
class PiecePeers(Protocol):
    """Peers whose fragments can be read in part, straight to where the bytes are needed."""

    def read_into(self, pieces: Sequence[Piece]) -> None:
        """Fill the memory of each piece. Raises PeerLost if not all of it is there."""


class MemoryPeers:
    """Peers within one process, which can be lost and replaced at will."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._memories: dict[str, dict[str, bytes]] = {host: {} for host in hosts}

    def lose(self, peer: str) -> None:
        """Take a host away, with all that it kept."""
        with self._lock:
            self._memories.pop(peer, None)

    def replace(self, peer: str) -> None:
        """Bring a host, empty."""
        with self._lock:
            self._memories[peer] = {}

    def put(self, place: Place, data: Sequence[Buffer]) -> None:
        """Keep a copy."""
        value = b"".join(data)
        with self._lock:
            self._memory(place.peer)[place.name] = value

    def fetch(self, places: Sequence[Place]) -> list[Buffer | None]:
        """Return what is there."""
        with self._lock:
            return [self._memories.get(place.peer, {}).get(place.name) for place in places]

    def read_into(self, pieces: Sequence[Piece]) -> None:
        """Fill the memory of each piece."""
        for piece, found in zip(pieces, self.fetch([piece.place for piece in pieces]), strict=True):
            part = memoryview(found or b"")[piece.offset : piece.offset + piece.memory.nbytes]
            if part.nbytes != piece.memory.nbytes:
                raise PeerLost(f"{piece.place.peer} has too little of {piece.place.name}")
            piece.memory[:] = part

    def keys(self, peer: str, prefix: str) -> list[str]:
        """List the names."""
        with self._lock:
            return sorted(name for name in self._memory(peer) if name.startswith(prefix))

    def drop(self, peer: str, prefix: str) -> None:
        """Forget them."""
        with self._lock:
            memory = self._memory(peer)
            for name in [name for name in memory if name.startswith(prefix)]:
                del memory[name]

    def _memory(self, peer: str) -> dict[str, bytes]:
        try:
            return self._memories[peer]
        except KeyError:
            raise PeerLost(f"{peer} is gone, with what it kept") from None
