"""The desk of a host: shares are opened, announced and sealed here, and every snapshot gets its one outcome.

It keeps the books for the trainers' side and for the pipeline's threads, under one lock, and moves no bytes.
"""

import heapq
import logging
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from checkpoint.engine.arena import Arena, Region
from checkpoint.engine.contract import Durable, Failed, Outcome, Skipped, SnapshotPlan, Ticket
from checkpoint.engine.ledger import ShareEntry, SnapshotEntry, SnapshotId, Writing
from checkpoint.errors import ArenaFull, Mismatch

log = logging.getLogger("holdfast.checkpoint")

_LAST = 1 << 62  # sorts a snapshot's end behind all of its chunks
_MAX_REMEMBERED = 256
_MAX_UNREAD = 1000

News = deque[Outcome]


@dataclass(frozen=True, slots=True)
class Work:
    """Pack chunk number `chunk_index` of a share. Without a share: end the snapshot, all of it is packed."""

    entry: SnapshotEntry
    share: ShareEntry | None
    chunk_index: int


class Intake:
    """The books of one host's snapshots. Thread-safe."""

    def __init__(self, host: str, arena: Arena) -> None:
        self.host = host
        self.arena = arena
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._told = threading.Condition(lock)
        self._live: dict[SnapshotId, SnapshotEntry] = {}
        self._retiring: list[SnapshotEntry] = []
        self._over: OrderedDict[SnapshotId, None] = OrderedDict()
        self._failed: list[SnapshotEntry] = []
        self._work: list[tuple[SnapshotId, int, int]] = []
        self._readers: list[News] = []
        self._why_ending: str | None = None
        self._is_closed = False
        self._newest_generation = 0
        self._newer_since_s = 0.0

    def subscribe(self) -> News:
        """Return a queue that every later outcome is put into."""
        news: News = deque(maxlen=_MAX_UNREAD)
        with self._changed:
            self._readers.append(news)
        return news

    def unsubscribe(self, news: News) -> None:
        """Forget a queue."""
        with self._changed:
            self._readers = [reader for reader in self._readers if reader is not news]

    def await_news(self, news: News, timeout_s: float) -> tuple[Outcome, ...]:
        """Take what is in the queue, waiting a while for something."""
        with self._changed:
            if not news and timeout_s > 0:
                self._told.wait(timeout_s)
            taken = tuple(news)
            news.clear()
            return taken

    def open(self, ticket: Ticket, plan: SnapshotPlan, owner: object) -> Region | None:
        """Lend a region for a share, waiting for room as the plan says; None when the snapshot is over."""
        if not ticket.rank < len(plan.hosts) or plan.hosts[ticket.rank] != self.host:
            raise Mismatch(f"rank {ticket.rank} of hosts {plan.hosts} does not live on {self.host!r}")
        deadline = time.monotonic() + plan.handling.max_wait_s
        with self._changed:
            if ticket.generation > self._newest_generation:
                self._newest_generation, self._newer_since_s = ticket.generation, time.monotonic()
            self._supersede(ticket)
            entry = self._admit(ticket, plan)
            if entry is None:
                return None
            try:
                while (region := self.arena.reserve(plan.num_bytes)) is None:
                    remaining_s = 0.0 if plan.handling.when_full == "skip" else deadline - time.monotonic()
                    if remaining_s <= 0:
                        self._end(entry, Skipped(ticket.step, ticket.generation, self._fullness(plan)))
                    else:
                        self._changed.wait(min(remaining_s, 1.0))
                    if entry.why_failed is not None or self._is_closed:
                        return None
            except ArenaFull as error:
                self._fail(entry, str(error))
                raise
            entry.shares[ticket.rank] = ShareEntry(plan, region, owner)
            return region

    def ready(self, ticket: Ticket, chunk_index: int) -> None:
        """Take note that a chunk is in the arena."""
        with self._changed:
            if found := self._find(ticket):
                self._announce(*found, ticket.rank, chunk_index)

    def seal(self, ticket: Ticket) -> None:
        """Take note that a share is whole and stays as it is."""
        with self._changed:
            if found := self._find(ticket):
                entry, share = found
                for chunk_index in range(len(share.plan.slots)):
                    self._announce(entry, share, ticket.rank, chunk_index)
                share.writing = Writing.SEALED
                self._advance(entry)

    def spoil(self, ticket: Ticket, why: str) -> None:
        """Give a share up, and with it its snapshot."""
        with self._changed:
            if found := self._find(ticket):
                entry, share = found
                share.writing = Writing.GONE
                self._fail(entry, why)

    def leave(self, owner: object, why: str) -> None:
        """Give up what an owner that is gone had not sealed."""
        with self._changed:
            for entry in [*self._live.values(), *self._retiring]:
                for share in entry.shares.values():
                    if share.owner is owner and share.writing is Writing.OPEN:
                        share.writing = Writing.GONE
                        self._fail(entry, why)

    def abandon(self, why: str) -> None:
        """Give up every snapshot that is not captured: nobody is left who could deliver the rest."""
        with self._changed:
            for entry in list(self._live.values()):
                if not entry.is_captured:
                    self._fail(entry, f"{entry.missing()}: {why}")

    def end(self, why: str) -> None:
        """Take no new snapshot from now on, and give up those that are not captured."""
        with self._changed:
            self._why_ending = why
            self.abandon(why)

    def drain(self, timeout_s: float) -> bool:
        """Wait until every captured snapshot has its outcome; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_s)

    @property
    def num_unfinished(self) -> int:
        """How many snapshots are captured and not yet durable."""
        with self._changed:
            return sum(entry.is_captured for entry in self._live.values())

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken or given."""
        return self._is_closed

    def close(self) -> None:
        """Take and give nothing more; who waits is let go."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._told.notify_all()

    # What the pipeline's threads call.

    def next_work(self) -> Work | None:
        """Wait for the next chunk to pack, or a snapshot whose chunks all are; None after `close`."""
        with self._changed:
            while True:
                if self._is_closed:
                    return None
                while self._work:
                    key, rank, chunk_index = heapq.heappop(self._work)
                    entry = self._live.get(key)
                    if entry is None:
                        continue  # it failed meanwhile
                    if rank == _LAST:
                        return Work(entry, None, _LAST)
                    share = entry.shares[rank]
                    share.is_being_packed = True
                    return Work(entry, share, chunk_index)
                self._changed.wait()

    def packed(self, work: Work) -> None:
        """Take note that a chunk was packed, or that it was given up."""
        with self._changed:
            if work.share is not None:
                work.share.is_being_packed = False
                work.share.num_unpacked -= 1
                self._advance(work.entry)

    def fail(self, entry: SnapshotEntry, why: str) -> None:
        """End a snapshot that will not become a checkpoint."""
        with self._changed:
            self._fail(entry, why)

    def complete(self, entry: SnapshotEntry, outcome: Durable) -> None:
        """End a snapshot that has become a checkpoint."""
        with self._changed:
            self._end(entry, outcome)

    def failures(self) -> list[SnapshotEntry]:
        """Return (once) the snapshots that failed."""
        with self._changed:
            failed, self._failed = self._failed, []
            return failed

    def expire(self, patience_s: float, straggler_s: float) -> None:
        """Give up snapshots that a local rank owes for `patience_s`, or `straggler_s` after a newer world
        saved.

        All living ranks are in the newer world; what is still owed to an older one is a last capture in hand,
        or a dead rank's.
        """
        now = time.monotonic()
        with self._changed:
            for entry in list(self._live.values()):
                is_old = entry.generation < self._newest_generation
                limit_s, since_s = (
                    (straggler_s, self._newer_since_s) if is_old else (patience_s, entry.started_s)
                )
                if not entry.is_captured and now - since_s > limit_s:
                    self._fail(entry, f"{entry.missing()} within {limit_s:.0f} s")

    # All of the following under the lock.
    def _is_idle(self) -> bool:
        return self.num_unfinished == 0

    def _admit(self, ticket: Ticket, plan: SnapshotPlan) -> SnapshotEntry | None:
        key = (ticket.generation, ticket.step)
        if key in self._over or self._is_closed:
            return None
        entry = self._live.get(key)
        if entry is None:
            entry = SnapshotEntry(key, ticket.run, plan.hosts, self.host, plan.content, time.monotonic())
            self._live[key] = entry
        if self._why_ending is not None:
            self._fail(entry, self._why_ending)
        elif ticket.rank in entry.shares:
            self._fail(entry, f"rank {ticket.rank} delivered step {ticket.step} twice")
        elif (entry.content.digest, entry.hosts) != (plan.content.digest, plan.hosts):
            self._fail(
                entry, f"rank {ticket.rank} saves another state than its neighbours at step {ticket.step}"
            )
        return entry if entry.why_failed is None else None

    def _supersede(self, ticket: Ticket) -> None:
        """A rank that goes on to a newer step of its world will not deliver an older one."""
        for entry in list(self._live.values()):
            is_older = entry.generation == ticket.generation and entry.step < ticket.step
            share = entry.shares.get(ticket.rank)
            if is_older and (share is None or share.writing is not Writing.SEALED):
                self._fail(entry, f"rank {ticket.rank} went on to step {ticket.step} without delivering")

    def _find(self, ticket: Ticket) -> tuple[SnapshotEntry, ShareEntry] | None:
        key = (ticket.generation, ticket.step)
        for entry in (self._live.get(key), *self._retiring):
            if entry is not None and entry.id == key and ticket.rank in entry.shares:
                return entry, entry.shares[ticket.rank]
        return None

    def _announce(self, entry: SnapshotEntry, share: ShareEntry, rank: int, chunk_index: int) -> None:
        if chunk_index in share.announced or entry.why_failed is not None:
            return
        share.announced.add(chunk_index)
        share.num_unpacked += 1
        heapq.heappush(self._work, (entry.id, rank, chunk_index))
        self._changed.notify_all()

    def _advance(self, entry: SnapshotEntry) -> None:
        """Do what a change of a snapshot made possible: free regions, let it end."""
        for region in entry.releasable():
            self.arena.release(region)
        if entry in self._retiring and all(share.is_released for share in entry.shares.values()):
            self._retiring.remove(entry)
        if entry.why_failed is None and entry.is_ready_to_end and not entry.is_packed:
            entry.is_packed = True
            heapq.heappush(self._work, (entry.id, _LAST, _LAST))
        self._changed.notify_all()

    def _fail(self, entry: SnapshotEntry, why: str) -> None:
        if entry.id in self._live:
            log.error("checkpoint of step %d failed: %s", entry.step, why)
            self._end(entry, Failed(entry.step, entry.generation, why))
        self._advance(entry)

    def _end(self, entry: SnapshotEntry, outcome: Outcome) -> None:
        """Publish the one outcome of a snapshot, and forget it as soon as its regions are free."""
        if self._live.pop(entry.id, None) is None:
            return
        entry.is_live = False
        self._over[entry.id] = None
        while len(self._over) > _MAX_REMEMBERED:
            self._over.popitem(last=False)
        if not isinstance(outcome, Durable):
            entry.why_failed = outcome.why
            self._failed.append(entry)
        self._retiring.append(entry)
        for news in self._readers:
            news.append(outcome)
        self._told.notify_all()
        self._advance(entry)

    def _fullness(self, plan: SnapshotPlan) -> str:
        return (
            f"the arena is full: {self.arena.num_lent_bytes} of {self.arena.num_bytes} bytes wait to be "
            f"written, {plan.num_bytes} more are needed: raise `checkpoint.arena_mib` or save less often"
        )
