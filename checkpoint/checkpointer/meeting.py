"""How the keepers of a world's hosts come to know each other: over the store that torch.distributed has.

Only a restore waits for the other ranks: it asks them. A save looks in that store, where addresses and tokens
are plain text and no pickle, whether they are there, and goes on.
"""

import json
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from checkpoint.checkpointer.world import World
from checkpoint.engine.host import LocalHost
from checkpoint.errors import CheckpointError, KeeperLost
from checkpoint.keeper import KeeperHost
from checkpoint.keeper.peering.policy import (
    Addresses,
    Parity,
    PeerPolicy,
    addresses_to_json,
    parse_addresses,
)
from checkpoint.keeper.peering.source import PeerSource

log = logging.getLogger("holdfast.checkpoint")

_LOOK_S = 5.0  # a keeper that was replaced is known to the others this much later at most


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the keepers of a run's hosts are to each other; an `address` of "" is to be found out."""

    parity: Parity | None = None
    address: str = ""
    domain: str = ""


class Meeting:
    """Introduces the keeper of this host to those of the other hosts of one world."""

    def __init__(self, world: World, neighbours: Neighbours) -> None:
        self._world = world
        self._neighbours = neighbours
        self._hosts = tuple(dict.fromkeys(world.hosts))
        self._num_changes = -1
        self._published: object = None
        self._looked_s = 0.0
        self._is_hopeless = False

    def of(self, world: World) -> "Meeting":
        """Return the meeting of another world."""
        return Meeting(world, self._neighbours)

    @property
    def is_wanted(self) -> bool:
        """Whether there are several hosts."""
        return len(self._hosts) > 1

    def look(self, host: KeeperHost | LocalHost | None) -> None:
        """Go on with the introduction, without waiting: the first rank of each host does."""
        is_first = self._world.rank == self._world.hosts.index(self._world.host)
        if not self.is_wanted or not is_first or self._is_hopeless or not isinstance(host, KeeperHost):
            return
        if self._num_changes >= 0 and time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        try:
            self._introduce(host)
        except KeeperLost:
            return  # the next save starts another
        except (CheckpointError, RuntimeError) as error:  # a store of torch's raises the latter
            self._is_hopeless = True
            log.error("the hosts' keepers do not come together, no peer protects this one: %s", error)

    @contextmanager
    def source(self, told: Sequence[str]) -> Iterator[Sequence[PeerSource]]:
        """Give what all hosts' keepers hold, by what each rank tells of them (`keepers_known_to`).

        What a keeper says of itself counts most.
        """
        found = _merged([parse_addresses(json.loads(one)) for one in told], self._world.hosts)
        if not found:
            yield ()
            return
        source = PeerSource(found, self._world.host)
        try:
            yield (source,)
        finally:
            source.close()

    def _introduce(self, host: KeeperHost) -> None:
        store = distributed_c10d._get_default_store()
        if self._published is not host.keeper:
            known = host.listen(self._policy(store))
            told = addresses_to_json({self._world.host: known[self._world.host]})
            store.set(self._key("keeper", self._world.host), json.dumps(told))
            store.add(self._key("changes"), 1)
            self._published, self._num_changes = host.keeper, -1
        keys = [self._key("keeper", one) for one in self._hosts]
        if not store.check(keys):
            return
        num_changes = int(store.add(self._key("changes"), 0))
        if num_changes == self._num_changes:
            return
        addresses: dict[str, Any] = {}
        for key in keys:
            addresses |= json.loads(store.get(key))
        host.meet(self._world.generation, parse_addresses(addresses))
        self._num_changes = num_changes

    def _policy(self, store: Any) -> PeerPolicy:
        neighbours = self._neighbours
        address = neighbours.address or _own_address(store)
        return PeerPolicy(address, neighbours.domain, neighbours.parity)

    def _key(self, *names: str) -> str:
        return "/".join(("holdfast", str(self._world.generation), *names))


def keepers_known_to(host: KeeperHost | LocalHost | None) -> str:
    """Return the addresses of the keepers that a rank's own knows, for the other ranks."""
    return json.dumps(addresses_to_json(host.peers() if isinstance(host, KeeperHost) else {}))


def rebuilt_notes(sources: Sequence[PeerSource], step: int) -> tuple[str, ...]:
    """Say which hosts' shares a restore had rebuilt."""
    return tuple(
        f"the share of host {host}, which is lost, was rebuilt from parity for step {step}: {num_bytes} bytes"
        for source in sources
        for host, num_bytes in source.rebuilt().items()
        if num_bytes
    )


def _merged(told: Sequence[Addresses], hosts: Sequence[str]) -> Addresses:
    merged: dict[str, Any] = {}
    for addresses in told:
        merged |= addresses
    for addresses, host in zip(told, hosts, strict=True):
        merged |= {host: addresses[host]} if host in addresses else {}
    return merged


def _own_address(store: Any) -> str:
    """Return the address of this machine from which its packets to the first rank's leave."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    target = store.host if isinstance(store, TCPStore) else socket.gethostname()
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def check_neighbours(neighbours: Neighbours, num_held: int) -> None:
    """Raise ValueError for parity over snapshots that nobody holds."""
    if neighbours.parity is not None and not num_held:
        raise ValueError("parity protects what is held in memory: give `memory` 1 or more")
