"""Snapshots out of the memories of several hosts, as a restore reads them: each share from where it is.

A share is read from its own host's keeper; if that host is lost, it is rebuilt from its parity group. Only
snapshots of which every host's share can be had so count: a coherent step, or none.
"""

import logging
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from checkpoint.engine.ledger import SnapshotId
from checkpoint.errors import (
    CheckpointError,
    Corrupt,
    FormatError,
    NoCheckpoint,
    PeerLost,
    Unrecoverable,
)
from checkpoint.format.codec import Buffer
from checkpoint.format.manifest import Manifest
from checkpoint.format.records import MAX_CHUNK_BYTES
from checkpoint.format.table import ChunkTable
from checkpoint.keeper.messages import Message
from checkpoint.keeper.peering.dialing import Link, TcpPeers, listing_of
from checkpoint.keeper.peering.marks import name_of, parse_name
from checkpoint.keeper.peering.policy import Addresses
from checkpoint.keeper.peering.shares import PREFIX, Share, decode_head, head_bytes, merge
from checkpoint.redundancy.groups import Group
from checkpoint.redundancy.parity import recoverable
from checkpoint.redundancy.recovery import Recovery
from checkpoint.redundancy.scratch import let_idle_go
from checkpoint.redundancy.stripes import Stripes
from checkpoint.store.contract import ByteRange

log = logging.getLogger("holdfast.checkpoint")

_MAX_BLOCK_BYTES = 64 << 20
_NUM_TOGETHER = 3  # blocks asked for at once: about a request of a restore


@dataclass(frozen=True, slots=True)
class _Found:
    """A snapshot that is left, in part or whole: its world's hosts, who holds a share, and parity groups."""

    hosts: tuple[str, ...]
    holders: frozenset[str]
    groups: tuple[Stripes, ...]


class PeerSource:
    """The snapshots in some keepers' memories. What it pins there is let go by `close`."""

    def __init__(self, addresses: Addresses, own: str = "") -> None:
        """`own` is the host that this process lives on, if it is one of them."""
        self._own = own
        self._peers = TcpPeers(addresses)
        self._lock = threading.RLock()
        self._found: dict[SnapshotId, _Found] | None = None
        self._opened: dict[SnapshotId, _Opened] = {}

    @property
    def name(self) -> str:
        """What reports call it."""
        return "peers"

    def origin(self, pack: int) -> str:
        """Tell a share in this host's own memory, in a peer's, and one that was rebuilt from parity."""
        share = self._shares()[pack]
        if share.recovery is not None:
            return "parity"
        return "memory" if share.host == self._own else "peers"

    def steps(self) -> list[int]:
        """List the steps of which every host's share is there or can be rebuilt; of one generation only."""
        return sorted(id_[1] for id_ in self._usable())

    def manifest(self, step: int) -> Manifest:
        """Return the manifest of a step, put together from all hosts' shares."""
        return self._open(step).manifest

    def chunks(self, manifest: Manifest, tensors: Collection[int] | None = None) -> ChunkTable:
        """Return the chunks of all shares."""
        table = self._open(manifest.step).table
        return table if tensors is None else table.of_tensors(tensors)

    def read(self, manifest: Manifest, pack: int, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """Read ranges of a host's share."""
        share = self._open(manifest.step).shares[pack]
        try:
            return [share.read(wanted) for wanted in ranges]
        except (PeerLost, Unrecoverable) as error:
            raise Corrupt(f"the share of host {share.host} is gone: {error}") from error

    @property
    def piece_bytes(self) -> int:
        """A whole chunk: every piece is a question to another host."""
        return MAX_CHUNK_BYTES

    def can_read_into(self, pack: int) -> bool:
        """Whether a share comes straight to where it belongs: not if it takes whole blocks."""
        recovery = self._shares()[pack].recovery
        return recovery is None or recovery.can_read_quickly

    def read_into(self, manifest: Manifest, pack: int, offset: int, pieces: Iterable[memoryview]) -> None:
        """Fill memory with bytes of a host's share. What is rebuilt so was proved by nobody."""
        share = self._open(manifest.step).shares[pack]
        try:
            for piece in pieces:
                share.read_into(offset, piece)
                offset += piece.nbytes
        except (PeerLost, Unrecoverable) as error:
            raise Corrupt(f"the share of host {share.host} is gone: {error}") from error

    def rebuilt(self) -> Mapping[str, int]:
        """Tell which hosts' shares were rebuilt from parity, and how many bytes of each had to be."""
        recoveries = {share.host: share.recovery for share in self._shares() if share.recovery is not None}
        return {host: one.num_rebuilt_bytes for host, one in sorted(recoveries.items())}

    def close(self) -> None:
        """Let the keepers go."""
        for opened in self._opened.values():
            for share in opened.shares:
                share.close()
        self._peers.close()
        let_idle_go()

    def _shares(self) -> "Sequence[_Reader]":
        """Return the shares of what was opened last."""
        with self._lock:
            return next(reversed(self._opened.values())).shares if self._opened else ()

    def _open(self, step: int) -> "_Opened":
        id_ = next((id_ for id_ in self._usable() if id_[1] == step), None)
        if id_ is None:
            raise NoCheckpoint(f"the hosts' memories do not hold all of step {step}")
        with self._lock:
            if id_ not in self._opened:
                self._opened[id_] = self._assembled(id_)
            return self._opened[id_]

    def _assembled(self, id_: SnapshotId) -> "_Opened":
        """Open all hosts' shares of a snapshot, and put them together."""
        found = self._usable()[id_]
        readers: list[_Reader] = []
        try:
            for host in dict.fromkeys(found.hosts):
                readers.append(_Reader(host, id_, self._peers, _stripes_of(host, found.groups)))
            manifest, table = merge([reader.open() for reader in readers])
        except (PeerLost, Unrecoverable) as error:
            _close_all(readers)
            raise NoCheckpoint(f"step {id_[1]} cannot be had from the hosts' memories: {error}") from error
        except FormatError:
            _close_all(readers)
            raise
        return _Opened(manifest, table, readers)

    def _usable(self) -> dict[SnapshotId, _Found]:
        """Return the snapshots that are whole, in the newest generation that has any; found out once."""
        with self._lock:
            if self._found is None:
                listed = listing_of(self._peers)
                whole = {id_: one for id_, one in _collected(listed).items() if self._is_whole(id_, one)}
                newest = max((id_[0] for id_ in whole), default=0)
                self._found = {id_: one for id_, one in whole.items() if id_[0] == newest}
            return self._found

    def _is_whole(self, id_: SnapshotId, found: _Found) -> bool:
        """Whether every host's share is held, or can be rebuilt."""
        for host in set(found.hosts) - found.holders:
            stripes = _stripes_of(host, found.groups)
            if stripes is None or name_of(id_) not in recoverable(self._peers, stripes):
                return False
            reader = _Reader(host, id_, self._peers, stripes)
            try:
                reader.open()
            except CheckpointError as error:
                log.info("the share of %s of step %d cannot be rebuilt: %s", host, id_[1], error)
                return False
            finally:
                reader.close()
        return True


@dataclass(frozen=True, slots=True)
class _Opened:
    """A snapshot whose shares are open; a chunk's pack is the number of its share."""

    manifest: Manifest
    table: ChunkTable
    shares: "Sequence[_Reader]"


@dataclass(slots=True)
class _Reader:
    """One host's share: read from its keeper as long as that is there, else rebuilt. Thread-safe."""

    host: str
    id: SnapshotId
    peers: TcpPeers
    stripes: Stripes | None
    recovery: Recovery | None = None
    link: Link | None = None
    body: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> Share:
        """Pin the share where it is, or prepare to rebuild it; return what it holds."""
        where = f"{self.host}'s share of step {self.id[1]}"
        head: Buffer
        try:
            self.link, head = self.peers.pin(self.host, self.id)
        except PeerLost as error:
            self._recover(error)
            head = self._at(0, head_bytes(self._at(0, PREFIX.size)))
        share = decode_head(head, where)
        if (share.host, share.id) != (self.host, self.id):
            raise Corrupt(f"{where} is of {share.host}, step {share.id[1]}, generation {share.id[0]}")
        self.body = memoryview(head).nbytes
        return share

    def read(self, wanted: ByteRange) -> Buffer:
        """Return bytes of the share's body. Raises PeerLost, Unrecoverable."""
        return self._at(self.body + wanted.offset, wanted.num_bytes)

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Fill memory with bytes of the share's body, unproved. Raises PeerLost, Unrecoverable."""
        if self.recovery is None and self._is_read(memory, self.body + offset):
            return
        if self.recovery is not None:
            self.recovery.read_quickly(memory, self.body + offset)

    def close(self) -> None:
        """Let the snapshot go."""
        if self.link is not None:
            self.link.close()

    def _at(self, offset: int, num_bytes: int) -> Buffer:
        memory = np.empty(num_bytes, np.uint8).data
        if self.recovery is None and self._is_read(memory, offset):
            return memory
        if self.recovery is not None:
            self.recovery.read_into(memory, offset)
        return memory

    def _is_read(self, memory: memoryview, offset: int) -> bool:
        """Read from the share's own host; if that is lost, go over to rebuilding."""
        place = {"snapshot": list(self.id), "offset": offset, "wanted": memory.nbytes}
        try:
            self.peers.ask(self.host, {"verb": "read", **place}, memory=[memory])
        except PeerLost as error:
            self._recover(error)
            return False
        return True

    def _recover(self, error: PeerLost) -> None:
        """Go over to rebuilding. Raises PeerLost if there is no parity, Unrecoverable if not enough of it."""
        if self.stripes is None:
            raise error
        with self.lock:
            if self.recovery is None:
                name = name_of(self.id)
                self.recovery = Recovery(
                    self.peers,
                    self.stripes,
                    host=self.host,
                    snapshot=name,
                    num_together=_NUM_TOGETHER,
                )


def _close_all(readers: Sequence[_Reader]) -> None:
    for reader in readers:
        reader.close()


def _stripes_of(host: str, groups: Sequence[Stripes]) -> Stripes | None:
    """Return the parity group that protects a host, if there is one."""
    return next((stripes for stripes in groups if host in stripes.group.hosts), None)


def _collected(listed: Mapping[str, Message]) -> dict[SnapshotId, _Found]:
    """Bring together what the keepers say; of hosts that contradict each other the snapshot is left out."""
    worlds: dict[SnapshotId, set[tuple[Any, ...]]] = {}
    holders: dict[SnapshotId, set[str]] = {}
    groups: dict[SnapshotId, set[Stripes]] = {}
    for host, said in listed.items():
        for generation, step, hosts, digest in said["held"]:
            worlds.setdefault((generation, step), set()).add((tuple(hosts), digest))
            holders.setdefault((generation, step), set()).add(host)
        for name, (members, num_parity, block_bytes) in said["groups"].items():
            id_ = parse_name(name)
            if id_ is not None and 0 < block_bytes <= _MAX_BLOCK_BYTES:
                with suppress(CheckpointError):
                    groups.setdefault(id_, set()).add(Stripes(Group(tuple(members), num_parity), block_bytes))
    return {
        id_: _Found(next(iter(world))[0], frozenset(holders[id_]), tuple(groups.get(id_, ())))
        for id_, world in worlds.items()
        if len(world) == 1
    }
