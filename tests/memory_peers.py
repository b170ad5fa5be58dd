"""Peers' memories within one process, for tests."""

import threading
from collections.abc import Sequence

from checkpoint.errors import PeerLost
from checkpoint.redundancy.peers import Piece, Place
from checkpoint.store.contract import Buffer


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
