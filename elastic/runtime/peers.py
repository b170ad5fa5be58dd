"""The keepers of a run's hosts among each other: introduced world by world, over the driver's rendezvous.

Addresses and tokens are plain bytes in that store: they are in no pickle, no order and no event of Ray's. The
hosts of a parity group are different machines, as Ray tells them apart, so that parity never lies with what
it protects.
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

from checkpoint import (
    CheckpointError,
    HeldSource,
    KeeperHost,
    Parity,
    PeerPolicy,
    PeerSource,
    addresses_to_json,
    parse_addresses,
)
from elastic.control.instructions import FormWorld
from elastic.runtime.world import Endpoint

log = logging.getLogger("holdfast.worker")

MEET_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Home:
    """A member's host, its network address, and how the keepers protect what they hold."""

    host: str
    address: str
    parity: Parity | None


class Neighbours:
    """Introduces the keeper of a member's host to the others' of each world that the member joins."""

    def __init__(self, keeper: KeeperHost, home: Home) -> None:
        self._keeper = keeper
        self._home = home

    def meet(self, form: FormWorld, member: str, endpoint: Endpoint) -> None:
        """Begin the introduction; training goes on meanwhile. The first member of each host does it."""
        if len(set(form.hosts)) > 1 and form.hosts.index(self._home.host) == form.members.index(member):
            threading.Thread(
                target=self._introduce, args=(form, endpoint), name="holdfast-meeting", daemon=True
            ).start()

    @contextmanager
    def sources(self) -> Iterator[tuple[HeldSource | PeerSource, ...]]:
        """Give what this host's memory holds, and those of the hosts that its keeper knows."""
        with self._keeper.held() as held:
            own = () if held is None else (HeldSource(held),)
            known = self._keeper.peers()
            if not known:
                yield own
                return
            source = PeerSource(known, self._home.host)
            try:
                yield (*own, source)
            finally:
                source.close()

    def _introduce(self, form: FormWorld, endpoint: Endpoint) -> None:
        try:
            store = PrefixStore(
                f"keepers-{form.generation}",
                TCPStore(endpoint.host, endpoint.port, is_master=False, timeout=MEET_TIMEOUT),
            )
            known = self._keeper.listen(PeerPolicy(self._home.address, parity=self._home.parity))
            store.set(
                self._home.host, json.dumps(addresses_to_json({self._home.host: known[self._home.host]}))
            )
            hosts = list(dict.fromkeys(form.hosts))
            store.wait(hosts, MEET_TIMEOUT)
            told = {host: json.loads(store.get(host))[host] for host in hosts}
            self._keeper.meet(form.generation, parse_addresses(told))
        except (CheckpointError, RuntimeError) as error:  # a store of torch's raises the latter
            log.warning("the keepers of world %d did not meet: %s", form.generation, error)
