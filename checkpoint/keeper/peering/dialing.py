"""The port to peers' memories over TCP: calls the keepers of other hosts, and reads what they hold."""

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from checkpoint.engine.ledger import SnapshotId
from checkpoint.errors import KeeperLost, PeerLost
from checkpoint.keeper.messages import Message, receive, receive_bytes, send, send_bytes
from checkpoint.keeper.peering.handshake import introduce
from checkpoint.keeper.peering.policy import Address, Addresses
from checkpoint.redundancy.peers import Piece, Place
from checkpoint.redundancy.scratch import scratch
from checkpoint.store.contract import Buffer, parts_of

ABSENT = -1  # in the sizes of a reply: nothing is there
_CONNECT_S = 3.0
ANSWER_S = 10.0  # a peer that says nothing for so long is gone
_REST_S = 2.0  # a peer that could not be reached is left alone for so long
_NOTHING: tuple[Buffer, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A peer's answer: what it says, and the bytes that came with it, None where it has none."""

    said: Message
    data: list[Buffer | None]


class Link:
    """One connection to a keeper that takes requests, one after the other. Raises PeerLost when it breaks."""

    def __init__(self, address: Address, answer_s: float) -> None:
        try:
            where = (address.host, address.port)
            self._channel = socket.create_connection(where, timeout=_CONNECT_S)
        except OSError as error:
            raise PeerLost(f"the keeper at {address.host}:{address.port} is gone: {error}") from error
        try:
            self._channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._channel.settimeout(answer_s)
            introduce(self._channel, address.token)
        except PeerLost:
            self._channel.close()
            raise

    def ask(self, message: Message, data: Sequence[Buffer] = _NOTHING) -> None:
        """Send a request."""
        parts = parts_of(list(data))
        try:
            send(self._channel, {**message, "num_bytes": sum(part.nbytes for part in parts)})
            send_bytes(self._channel, parts)
        except KeeperLost as error:
            raise PeerLost(str(error)) from error

    def answer(self, memory: Sequence[memoryview] = ()) -> Reply:
        """Receive the reply; what came with it lies in `memory`, if that is given and as long."""
        try:
            said = receive(self._channel)
            sizes = said.get("sizes", [])
            if memory and sizes != [one.nbytes for one in memory]:
                wanted = sum(one.nbytes for one in memory)
                raise PeerLost(f"it sent {sizes} instead of {wanted} bytes: {said.get('error', '')}")
            rooms: list[memoryview | None] = list(memory)
            rooms = rooms or [None if size == ABSENT else scratch(size).data for size in sizes]
            for room in rooms:
                if room is not None:
                    receive_bytes(self._channel, room)
        except KeeperLost as error:
            raise PeerLost(str(error)) from error
        if "error" in said:
            raise PeerLost(str(said["error"]))
        return Reply(said, [*rooms])

    def close(self) -> None:
        """End the connection."""
        with suppress(OSError):
            self._channel.close()


class TcpPeers:
    """Keepers by the names of their hosts. Thread-safe. Connections are kept for the next request."""

    def __init__(self, addresses: Addresses, *, answer_s: float = ANSWER_S) -> None:
        self._addresses = dict(addresses)
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._idle: dict[str, list[Link]] = defaultdict(list)
        self._down: dict[str, tuple[float, str]] = {}

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts whose addresses are known."""
        return tuple(self._addresses)

    def put(self, place: Place, data: Sequence[Buffer]) -> None:
        """Keep the buffers' bytes on a peer."""
        self.ask(place.peer, {"verb": "put", "name": place.name}, data)

    def fetch(self, places: Sequence[Place]) -> list[Buffer | None]:
        """Return what is at each of the places; the peers look for it at the same time."""
        names: dict[str, list[str]] = defaultdict(list)
        for place in places:
            names[place.peer].append(place.name)
        asked: dict[str, Link] = {}
        for peer, wanted in names.items():
            with suppress(PeerLost):
                asked[peer] = self._asked(peer, {"verb": "fetch", "names": wanted}, _NOTHING)
        found: dict[Place, Buffer | None] = {}
        for peer, link in asked.items():
            with suppress(PeerLost):
                reply = self._answered(peer, link)
                found |= {Place(peer, n): one for n, one in zip(names[peer], reply.data, strict=True)}
        return [found.get(place) for place in places]

    def read_into(self, pieces: Sequence[Piece]) -> None:
        """Fill the memory of each piece; the peers send at the same time."""
        wanted: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            wanted[piece.place.peer].append(piece)
        asked: dict[str, Link] = {}
        try:
            for peer, some in wanted.items():
                parts = [[one.place.name, one.offset, one.memory.nbytes] for one in some]
                asked[peer] = self._asked(peer, {"verb": "pieces", "pieces": parts}, _NOTHING)
            for peer, some in wanted.items():
                self._answered(peer, asked.pop(peer), [one.memory for one in some])
        finally:
            for link in asked.values():  # an answer is under way there, which nobody waits for
                link.close()

    def keys(self, peer: str, prefix: str) -> list[str]:
        """List the names that a peer keeps."""
        return [str(name) for name in self.ask(peer, {"verb": "keys", "prefix": prefix}).said["names"]]

    def drop(self, peer: str, prefix: str) -> None:
        """Forget fragments on a peer."""
        self.ask(peer, {"verb": "drop", "prefix": prefix})

    def ask(
        self,
        peer: str,
        message: Message,
        data: Sequence[Buffer] = _NOTHING,
        *,
        memory: Sequence[memoryview] = (),
    ) -> Reply:
        """Ask a peer. Raises PeerLost if it is gone or refuses."""
        return self._answered(peer, self._asked(peer, message, data), memory)

    def pin(self, peer: str, id_: SnapshotId) -> tuple[Link, Buffer]:
        """Pin a snapshot on a peer for as long as the link that is returned is open; return its head."""
        link = self._dial(peer)
        try:
            link.ask({"verb": "pin", "snapshot": list(id_)})
            head = link.answer().data[0]
        except PeerLost:
            link.close()
            raise
        if head is None:
            link.close()
            raise PeerLost(f"{peer} does not hold the snapshot of step {id_[1]} any longer")
        return link, head

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            links = [link for idle in self._idle.values() for link in idle]
            self._idle.clear()
        for link in links:
            link.close()

    def _asked(self, peer: str, message: Message, data: Sequence[Buffer]) -> Link:
        """Send a request; over a new connection if the one at hand has ended meanwhile."""
        with self._lock:
            link = self._idle[peer].pop() if self._idle[peer] else None
        if link is not None:
            try:
                link.ask(message, data)
                return link
            except PeerLost:
                link.close()
        link = self._dial(peer)
        try:
            link.ask(message, data)
        except PeerLost:
            link.close()
            raise
        return link

    def _answered(self, peer: str, link: Link, memory: Sequence[memoryview] = ()) -> Reply:
        try:
            reply = link.answer(memory)
        except PeerLost as error:
            link.close()
            raise PeerLost(f"{peer}: {error}") from error
        with self._lock:
            self._idle[peer].append(link)
        return reply

    def _dial(self, peer: str) -> Link:
        with self._lock:
            address = self._addresses.get(peer)
            until_s, why = self._down.get(peer, (0.0, ""))
        if address is None or time.monotonic() < until_s:
            raise PeerLost(f"{peer} cannot be reached: {why or 'its address is not known'}")
        try:
            return Link(address, self._answer_s)
        except PeerLost as error:
            with self._lock:
                self._down[peer] = time.monotonic() + _REST_S, str(error)
            raise


def listing_of(peers: TcpPeers) -> Mapping[str, Message]:
    """Ask all peers what they hold; who cannot be reached is left out."""
    found: dict[str, Message] = {}
    for peer in peers.hosts:
        with suppress(PeerLost):
            found[peer] = peers.ask(peer, {"verb": "listed"}).said
    return found
