"""Who keeps parity for whom: groups that no failure domain meets twice, and stripes that rotate."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from checkpoint.errors import CheckpointError

MAX_MEMBERS = 32  # what the Reed-Solomon library can number


@dataclass(frozen=True, slots=True)
class Group:
    """Hosts that make up for the loss of any `num_parity` of them.

    There are as many stripes as hosts, and every stripe has one row on every host: first k data rows, then m
    parity rows. The parity rotates, so that each host keeps parity in m stripes and has its data in the other
    k: never both in one. What a host protects is cut into k pieces; its piece `row` is that data row of one
    stripe. (RAID 5 over memories, as in REFT's RAIM5, for m losses.)
    """

    hosts: tuple[str, ...]
    num_parity: int = 1

    def __post_init__(self) -> None:
        if len(set(self.hosts)) != len(self.hosts):
            raise CheckpointError(f"a host is twice in one parity group: {', '.join(self.hosts)}")
        if not 1 <= self.num_parity < len(self.hosts) <= MAX_MEMBERS:
            raise CheckpointError(
                f"{len(self.hosts)} hosts cannot make up for {self.num_parity} losses: "
                f"use 1 to {MAX_MEMBERS - 1} losses and at least one host more, {MAX_MEMBERS} at most"
            )

    @property
    def num_data(self) -> int:
        """How many data rows a stripe has."""
        return len(self.hosts) - self.num_parity

    def stripe_of(self, host: str, row: int) -> int:
        """Return the stripe in which a host has this row."""
        return (self._index(host) - self.num_parity - row) % len(self.hosts)

    def holder(self, stripe: int, row: int) -> str:
        """Return the host that has this row of the stripe."""
        return self.hosts[(stripe + self.num_parity + row) % len(self.hosts)]

    def own_stripe(self, host: str) -> int:
        """Return the stripe that this host encodes: it has no data of its own in it."""
        return self._index(host)

    def _index(self, host: str) -> int:
        try:
            return self.hosts.index(host)
        except ValueError:
            raise CheckpointError(f"{host} is not in the parity group of {', '.join(self.hosts)}") from None


@dataclass(frozen=True, slots=True)
class Grouping:
    """All hosts dealt into groups, and those that no group could take."""

    groups: tuple[Group, ...]
    unprotected: tuple[str, ...]


def form_groups(domain_of: Mapping[str, str], *, group_size: int, num_parity: int = 1) -> Grouping:
    """Deal hosts into groups of about `group_size`, no two of a group in one failure domain.

    Sizes differ by at most one. They are smaller where there are few domains, and larger only where somebody
    would be left over. Hosts of a domain with so many that not all find partners elsewhere are unprotected.
    The same hosts give the same groups, whatever their order.
    """
    Group(tuple(f"h{number}" for number in range(group_size)), num_parity)  # checks the numbers
    hosts = sorted(domain_of)
    unprotected: list[str] = []
    while hosts:
        population = Counter(domain_of[host] for host in hosts)
        fewest, most = max(population.values()), len(hosts) // (num_parity + 1)
        num_groups = min(max(-(-len(hosts) // group_size), fewest), most)
        if fewest <= most and len(hosts) <= num_groups * MAX_MEMBERS:
            # By domain, the largest first: neighbours in this order go to different groups.
            dealt = sorted(hosts, key=lambda host: (-population[domain_of[host]], domain_of[host], host))
            groups = (Group(tuple(dealt[first::num_groups]), num_parity) for first in range(num_groups))
            return Grouping(tuple(groups), tuple(sorted(unprotected)))
        largest = max(sorted(population), key=lambda domain: population[domain])
        unprotected.append(max(host for host in hosts if domain_of[host] == largest))
        hosts.remove(unprotected[-1])
    return Grouping((), tuple(sorted(unprotected)))
