"""A keeper among others: what it shows them, whom it knows, and the parity that it keeps with them."""

import threading
from typing import Any

from checkpoint.engine.intake import Intake
from checkpoint.keeper.peering.dialing import ANSWER_S, TcpPeers
from checkpoint.keeper.peering.fragments import Fragments
from checkpoint.keeper.peering.handshake import new_token
from checkpoint.keeper.peering.policy import Address, PeerPolicy, addresses_to_json, parse_addresses
from checkpoint.keeper.peering.protector import Circle, Protector
from checkpoint.keeper.peering.serving import Goods, PeerListener
from checkpoint.keeper.peering.shelf import Shelf

_MIB = 1 << 20


class Neighbourhood:
    """Begins with the first `listen`, and ends with `close`. Thread-safe."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._lock = threading.Lock()
        self._own: Address | None = None
        self._before: dict[str, Address] = {}  # of the generation before: it may still hold what is wanted
        self._newest: dict[str, Address] = {}
        self._generation = -1
        self._fragments: Fragments | None = None
        self._listener: PeerListener | None = None
        self._protector: Protector | None = None

    def listen(self, policy: PeerPolicy) -> None:
        """Listen to peers from now on, and keep parity as the newest policy says. Raises StoreRefused."""
        with self._lock:
            if self._fragments is None:
                shelf = Shelf(self._intake)
                fragments = Fragments(self._budget_bytes(policy))
                token = new_token()
                self._listener = PeerListener(
                    policy.address, token, Goods(shelf, fragments, lambda: self.groups)
                )
                self._own = Address(policy.address, self._listener.port, token, policy.domain)
                self._fragments = fragments
                self._protector = Protector(self._intake.host, shelf, fragments)
            self._fragments.budget_bytes = self._budget_bytes(policy)
            if self._protector is not None:
                self._protector.parity = policy.parity

    @property
    def groups(self) -> dict[str, Any]:
        """The parity groups of the snapshots that are being protected."""
        return {} if self._protector is None else self._protector.groups()

    def known(self) -> dict[str, Any]:
        """Return all addresses that are known, one's own among them, as plain data: they hold tokens."""
        with self._lock:
            own = {} if self._own is None else {self._intake.host: self._own}
            return addresses_to_json({**self._before, **self._newest, **own})

    def meet(self, generation: int, told: dict[str, Any]) -> None:
        """Learn the hosts of a generation's world, the first rank's first."""
        with self._lock:
            if generation < self._generation:
                return
            addresses = parse_addresses(told)
            if generation > self._generation:
                self._before, self._generation = self._newest, generation
            self._newest = addresses
            domains = {host: one.domain or host for host, one in addresses.items()}
            if self._protector is not None:
                parity = self._protector.parity
                answer_s = ANSWER_S if parity is None else min(ANSWER_S, parity.patience_s)
                peers = TcpPeers(addresses, answer_s=answer_s)
                self._protector.meet(Circle(generation, domains, peers))

    def close(self) -> None:
        """Be reached no longer."""
        with self._lock:
            if self._listener is not None:
                self._listener.close()
            if self._protector is not None:
                self._protector.close()

    def _budget_bytes(self, policy: PeerPolicy) -> int:
        budget_mib = None if policy.parity is None else policy.parity.budget_mib
        return self._intake.arena.num_bytes if budget_mib is None else budget_mib * _MIB
