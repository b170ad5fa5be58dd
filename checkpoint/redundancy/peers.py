"""The port to peers' memories."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
