"""How long a keeper lives: while it has clients, a while longer, and until what it was given is durable."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """Decides when a keeper without clients may end. `alone_since_s` is None while there are any."""

    lease_s: float
    flush_s: float
    num_clients: int = 0
    alone_since_s: float | None = 0.0

    def joined(self) -> "Lease":
        """A client came."""
        return Lease(self.lease_s, self.flush_s, self.num_clients + 1, None)

    def left(self, now_s: float) -> "Lease":
        """A client went."""
        alone_since_s = now_s if self.num_clients == 1 else None
        return Lease(self.lease_s, self.flush_s, self.num_clients - 1, alone_since_s)

    def renewed(self, lease_s: float, flush_s: float) -> "Lease":
        """Other terms hold from now on."""
        return Lease(lease_s, flush_s, self.num_clients, self.alone_since_s)

    def is_over(self, now_s: float, num_unfinished: int) -> bool:
        """Whether to end: alone for the lease, and nothing left to flush, or no patience left to flush it."""
        if self.alone_since_s is None:
            return False
        alone_s = now_s - self.alone_since_s
        return alone_s >= self.lease_s + (self.flush_s if num_unfinished else 0.0)
