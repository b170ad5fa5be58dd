"""What a keeper is told of its peers: whether and where it listens to them, and how parity is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint.redundancy.groups import Group

Addresses = Mapping[str, "Address"]


@dataclass(frozen=True, slots=True)
class Address:
    """Where the keeper of a host is reached by its peers, and what it and they prove themselves with.

    `domain` is what breaks together, a rack or a machine; the hosts of a parity group are of different ones.
    """

    host: str
    port: int
    token: str
    domain: str = ""

    def __repr__(self) -> str:
        return f"Address({self.host}:{self.port})"  # the token gets into no log


@dataclass(frozen=True, slots=True)
class Parity:
    """How snapshots held in memory are protected by parity over the memories of a group of hosts.

    A group of about `group_size` hosts makes up for the loss of any `losses` of them. Snapshots at multiples
    of `every` steps are protected, the newest one as soon as the one before is: so parity takes what rate it
    can and holds nothing up. A host keeps at most `budget_mib` of parity for others, by default as much as
    its arena is large. A protection that is not whole after `patience_s` is given up.
    """

    group_size: int = 4
    losses: int = 1
    every: int = 1
    budget_mib: int | None = None
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        Group(tuple(f"h{number}" for number in range(self.group_size)), self.losses)  # checks the numbers
        if self.every < 1 or self.patience_s <= 0 or (self.budget_mib or 1) < 1:
            raise ValueError(f"parity every {self.every} steps, within {self.patience_s} s: use 1 or more")


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """A keeper listens to its peers on `address`, its machine's own; it is of this failure `domain`."""

    address: str
    domain: str = ""
    parity: Parity | None = None


def policy_to_json(policy: PeerPolicy) -> dict[str, Any]:
    """Write a policy as plain data."""
    parity = policy.parity
    fields = None if parity is None else {name: getattr(parity, name) for name in parity.__slots__}
    return {"address": policy.address, "domain": policy.domain, "parity": fields}


def parse_policy(fields: Mapping[str, Any]) -> PeerPolicy:
    """Read what `policy_to_json` wrote."""
    parity = fields["parity"]
    return PeerPolicy(fields["address"], fields["domain"], None if parity is None else Parity(**parity))


def addresses_to_json(addresses: Addresses) -> dict[str, list[Any]]:
    """Write addresses as plain data: for a private socket, a store or the other ranks, never for a log."""
    return {host: [one.host, one.port, one.token, one.domain] for host, one in addresses.items()}


def parse_addresses(fields: Mapping[str, list[Any]]) -> dict[str, Address]:
    """Read what `addresses_to_json` wrote."""
    return {host: Address(*values) for host, values in fields.items()}
