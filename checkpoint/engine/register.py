"""Which snapshots a host has under way, or in its arena; and, for a while, which are over.

Not thread-safe: its owner holds a lock around every call.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator

from checkpoint.engine.contract import Durable, Failed, Outcome, Skipped, SnapshotPlan, Ticket
from checkpoint.engine.ledger import ShareEntry, SnapshotEntry, SnapshotId
from checkpoint.engine.reign import Reign
from checkpoint.engine.room import in_order

_MAX_REMEMBERED = 256


class Register:
    """The entries of all snapshots of which anything is left."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._entries: dict[SnapshotId, SnapshotEntry] = {}
        self._over: OrderedDict[SnapshotId, Outcome] = OrderedDict()

    def __iter__(self) -> Iterator[SnapshotEntry]:
        return iter(list(self._entries.values()))

    def live(self) -> list[SnapshotEntry]:
        """List those without an outcome."""
        return [entry for entry in self if entry.is_live]

    def held(self) -> list[SnapshotEntry]:
        """List what is held, by generation and then as it was captured."""
        return in_order(self)

    def get(self, id_: SnapshotId) -> SnapshotEntry | None:
        """Return a snapshot's entry, if there is one."""
        return self._entries.get(id_)

    def find(self, ticket: Ticket) -> tuple[SnapshotEntry, ShareEntry] | None:
        """Return a share and its snapshot, if there are such."""
        entry = self._entries.get((ticket.generation, ticket.step))
        if entry is None or ticket.rank not in entry.shares:
            return None
        return entry, entry.shares[ticket.rank]

    def refusal(self, ticket: Ticket) -> str:
        """Say why a share comes too late, if it does."""
        match self._over.get((ticket.generation, ticket.step)):
            case None:
                return ""
            case Durable():
                return (
                    f"step {ticket.step} of generation {ticket.generation} was saved here before: restore, "
                    "or make another Checkpointer, to save it anew"
                )
            case Failed(why=why) | Skipped(why=why):
                return f"it was given up before rank {ticket.rank} delivered: {why}"

    def enter(self, ticket: Ticket, plan: SnapshotPlan) -> SnapshotEntry:
        """Return the entry of a share's snapshot, which is not over; a new one if need be."""
        key = (ticket.generation, ticket.step)
        if key not in self._entries:
            depth, now_s = plan.handling.depth, time.monotonic()
            self._entries[key] = SnapshotEntry(
                key, ticket.run, plan.hosts, self._host, plan.content, depth, now_s
            )
        return self._entries[key]

    def note_end(self, entry: SnapshotEntry, outcome: Outcome) -> None:
        """Remember how a snapshot ended: it is not begun again."""
        self._over[entry.id] = outcome
        while len(self._over) > _MAX_REMEMBERED:
            self._over.popitem(last=False)

    def overdue(
        self, reign: Reign, patience_s: float, straggler_s: float
    ) -> list[tuple[SnapshotEntry, float]]:
        """List what is not captured within its time, and that time, which is shorter for an older world's."""
        now_s, found = time.monotonic(), []
        for entry in self.live():
            is_old = entry.generation < reign.generation
            limit_s = straggler_s if is_old else patience_s
            since_s = reign.since_s if is_old else entry.started_s
            if not entry.is_captured and now_s - since_s > limit_s:
                found.append((entry, limit_s))
        return found

    def sweep(self) -> None:
        """Forget the snapshots of which nothing is left."""
        for entry in self:
            if not (entry.is_live or entry.is_held or entry.has_room):
                del self._entries[entry.id]


def objection(entry: SnapshotEntry, rank: int, plan: SnapshotPlan) -> str | None:
    """Say what is wrong with one more share of a snapshot."""
    if rank in entry.shares:
        return f"rank {rank} delivered step {entry.step} twice"
    described = (plan.content.digest, plan.hosts, plan.handling.depth)
    if (entry.content.digest, entry.hosts, entry.depth) != described:
        return f"rank {rank} saves another state than its neighbours at step {entry.step}"
    return None
