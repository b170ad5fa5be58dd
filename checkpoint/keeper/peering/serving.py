"""The keeper's side of its peers' calls: a TCP listener, and a session for each who knows the token."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from checkpoint.engine.ledger import SnapshotId
from checkpoint.errors import CheckpointError, KeeperLost, StoreRefused
from checkpoint.keeper.messages import Message, receive, receive_bytes, send, send_bytes, timeval
from checkpoint.keeper.peering.dialing import ABSENT
from checkpoint.keeper.peering.fragments import Fragments
from checkpoint.keeper.peering.handshake import admit
from checkpoint.keeper.peering.shelf import Shelf, Volume
from checkpoint.redundancy.parts import Parts
from checkpoint.store.contract import Buffer

log = logging.getLogger("holdfast.keeper")

_HANDSHAKE_S = 5.0
_IO_S = 10.0  # a caller that neither reads nor goes on writing for so long is given up
_MAX_PUT_BYTES = 64 << 20
_MAX_CALLERS = 512

Groups = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Goods:
    """What peers may ask for; `groups` tells which parity groups there are, by snapshot."""

    shelf: Shelf
    fragments: Fragments
    groups: Groups


class PeerListener:
    """Listens on one address, at a port that the system chooses, until it is closed."""

    def __init__(self, address: str, token: str, goods: Goods) -> None:
        """Raises StoreRefused if this machine has no such address."""
        self._token = token
        self._goods = goods
        try:
            self._listener = socket.create_server((address, 0), backlog=128)
        except OSError as error:
            raise StoreRefused(
                f"a keeper cannot listen on {address} ({error}): give an address of this machine's own"
            ) from error
        self.port = int(self._listener.getsockname()[1])
        self._callers = threading.Semaphore(_MAX_CALLERS)
        threading.Thread(target=self._listen, name="holdfast-peers", daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return  # closed
            if self._callers.acquire(blocking=False):
                threading.Thread(
                    target=self._attend, args=(channel,), name="holdfast-peer", daemon=True
                ).start()
            else:
                channel.close()

    def _attend(self, channel: socket.socket) -> None:
        session = _Session(channel, self._goods)
        try:
            channel.settimeout(_HANDSHAKE_S)
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            admit(channel, self._token)
            _be_patient(channel)
            session.talk()
        except KeeperLost:
            pass  # the caller left, or was turned away
        except Exception:
            log.exception("a peer's session broke")  # the session's border: the other ones go on
        finally:
            session.end()
            self._callers.release()


@dataclass(eq=False, slots=True)
class _Session:
    """One caller: requests and replies, one after the other, and what it pinned."""

    channel: socket.socket
    goods: Goods
    pinned: list[Volume] = field(default_factory=list)

    def talk(self) -> None:
        """Answer until the caller leaves."""
        while True:
            message = receive(self.channel)
            num_bytes = int(message.get("num_bytes", 0))
            if not 0 <= num_bytes <= _MAX_PUT_BYTES:
                raise KeeperLost(f"a peer sent {num_bytes} bytes at once: that is none of ours")
            given = memoryview(bytearray(num_bytes))
            receive_bytes(self.channel, given)
            try:
                self._handle(message, given)
            except KeeperLost:
                raise
            except CheckpointError as error:
                self._reply({"error": f"{type(error).__name__}: {error}"})

    def end(self) -> None:
        """Let go what the caller was reading."""
        while self.pinned:
            self.goods.shelf.unpin(self.pinned.pop())
        with suppress(OSError):
            self.channel.close()

    def _handle(self, message: Message, given: memoryview) -> None:
        fragments = self.goods.fragments
        match message["verb"]:
            case "put":
                fragments.put(str(message["name"]), [given])
                self._reply({})
            case "fetch":
                found = [fragments.fetch(str(name)) for name in message["names"]]
                sizes = [ABSENT if one is None else sum(map(len, one)) for one in found]
                self._send({"sizes": sizes}, [part for one in found for part in one or ()])
            case "pieces":
                self._send_pieces(message["pieces"])
            case "keys":
                self._reply({"names": fragments.keys(str(message["prefix"]))})
            case "drop":
                fragments.drop(str(message["prefix"]))
                self._reply({})
            case "listed":
                entries = self.goods.shelf.entries().values()
                held = [[*entry.id, entry.hosts, entry.content.digest] for entry in entries]
                self._reply({"held": held, "groups": self.goods.groups()})
            case "pin":
                volume = self.goods.shelf.pin(_id(message))
                if volume is not None:
                    self.pinned.append(volume)
                self._reply({}, [None if volume is None else volume.head])
            case "read":
                self._read(message)
            case other:
                self._reply({"error": f"a keeper of this version does not know the verb {other!r}"})

    def _send_pieces(self, wanted: Sequence[Sequence[Any]]) -> None:
        """Send parts of fragments; of those that are not there, or too short, the size alone."""
        found: list[list[memoryview] | None] = []
        for name, offset, num_bytes in wanted:
            whole = Parts(self.goods.fragments.fetch(str(name)) or ())
            is_there = 0 <= int(offset) <= int(offset) + int(num_bytes) <= whole.num_bytes
            found.append(whole.pieces(int(offset), int(offset) + int(num_bytes)) if is_there else None)
        sizes = [ABSENT if one is None else sum(map(len, one)) for one in found]
        self._send({"sizes": sizes}, [part for one in found for part in one or ()])

    def _read(self, message: Message) -> None:
        """Send bytes of a held snapshot as they lie in the arena; it stays meanwhile."""
        volume = self.goods.shelf.pin(_id(message))
        if volume is None:
            self._reply({}, [None])
            return
        try:
            start, num_bytes = int(message["offset"]), int(message["wanted"])
            if not 0 <= start <= start + num_bytes <= volume.value.num_bytes:
                self._reply({"error": f"step {message['snapshot'][1]} is shorter than was asked for here"})
                return
            self._send({"sizes": [num_bytes]}, volume.value.pieces(start, start + num_bytes))
        finally:
            self.goods.shelf.unpin(volume)

    def _reply(self, message: Message, data: Sequence[Buffer | None] = ()) -> None:
        sizes = [ABSENT if one is None else memoryview(one).nbytes for one in data]
        self._send({**message, "sizes": sizes}, [one for one in data if one is not None])

    def _send(self, message: Message, data: Sequence[Buffer]) -> None:
        send(self.channel, message)
        send_bytes(self.channel, data)


def _be_patient(channel: socket.socket) -> None:
    """Let a caller be idle as long as its host lives; one that vanished must not keep its pins."""
    channel.settimeout(None)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(_IO_S))
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _id(message: Message) -> SnapshotId:
    generation, step = message["snapshot"]
    return int(generation), int(step)
