"""The desk of a host: shares are opened, announced and sealed here, and every snapshot gets its one outcome.

It keeps the books for the trainers' side and for the pipeline's threads, under one lock, and moves no bytes.
"""

import logging
import threading
import time
from collections import deque

from checkpoint.engine.arena import Arena, Region, Sizing
from checkpoint.engine.contract import (
    MEMORY,
    Durable,
    Failed,
    Outcome,
    Pressure,
    Skipped,
    SnapshotPlan,
    Ticket,
)
from checkpoint.engine.held import Held
from checkpoint.engine.holding import Holding
from checkpoint.engine.ledger import ShareEntry, SnapshotEntry, Writing
from checkpoint.engine.naming import draw_life
from checkpoint.engine.news import Board
from checkpoint.engine.register import Register, objection
from checkpoint.engine.reign import Reign
from checkpoint.engine.room import Room, choose_excess
from checkpoint.engine.settling import await_end
from checkpoint.engine.worklist import Work, Worklist
from checkpoint.errors import ArenaFull, Mismatch
from checkpoint.format.codec import Codec

log = logging.getLogger("holdfast.checkpoint")


class Intake:
    """The books of one host's snapshots, of which it holds the newest `hold` in the arena.

    Thread-safe; its private methods are called under the lock.
    """

    def __init__(self, host: str, arena: Arena, hold: int = 0) -> None:
        self.host = host
        self.life = draw_life()
        self.arena = arena
        self.hold = hold
        self.board = Board()
        self._changed = threading.Condition(threading.RLock())
        self._register = Register(host)
        self._failed: list[SnapshotEntry] = []
        self._work = Worklist()
        self._undigested: deque[SnapshotEntry] = deque()
        self._room = Room(arena)
        self.holding = Holding(
            self._register, self._changed, advance=self._advance, is_closed=lambda: self._is_closed
        )
        self._why_ending: str | None = None
        self._is_closed = False
        self._reign = Reign()
        self._num_captured = 0

    def open(self, ticket: Ticket, plan: SnapshotPlan, owner: object) -> Region | Failed | None:
        """Lend a region for a share, waiting for room as the plan says.

        None if its snapshot failed, which the board tells; Failed, for who asked alone, if it was over.
        """
        if not ticket.rank < len(plan.hosts) or plan.hosts[ticket.rank] != self.host:
            raise Mismatch(f"rank {ticket.rank} of hosts {plan.hosts} does not live on {self.host!r}")
        with self._changed:
            self._reign.see(ticket.generation, plan.hosts[0], time.monotonic())
            self._supersede(ticket)
            if why := self._register.refusal(ticket) or (self._is_closed and f"{self.host} is closed"):
                return Failed(ticket.step, ticket.generation, why)
            entry = self._admit(ticket, plan)
            if entry is None:
                return None
            try:
                self._room.provide(plan.num_bytes, (2 + self.hold) * len(entry.local_ranks))
                region = self._await_room(entry, plan)
            except ArenaFull as error:
                self._fail(entry, str(error))
                return None
            if region is not None:
                entry.shares[ticket.rank] = ShareEntry(plan, region, owner)
            return region

    def is_stale(self, ticket: Ticket) -> bool:
        """Whether a ticket is of an older generation than this host knows, or of a snapshot that is over."""
        with self._changed:
            return bool(self._register.refusal(ticket)) or ticket.generation < self._reign.generation

    def adopt(self, hold: int, arena_bytes: int, sizing: Sizing) -> None:
        """Hold so many snapshots from now on, in an arena of that size at least. Raises ArenaFull."""
        with self._changed:
            self.hold = hold
            self._let_excess_go()
            self._register.sweep()
            self._changed.notify_all()
            self._room.adopt(arena_bytes, sizing)

    def ready(self, ticket: Ticket, chunks: tuple[int, ...]) -> None:
        """Take note that some chunks are in the arena.

        What a codec makes of one goes back to its place once the share is sealed, but not before: it would
        have to be kept besides the arena until then. So it is left alone for so long.
        """
        with self._changed:
            if found := self._register.find(ticket):
                entry, share = found
                if share.plan.handling.codec is Codec.RAW or entry.is_to_be_held:
                    self._announce(entry, share, ticket.rank, chunks)

    def seal(self, ticket: Ticket) -> None:
        """Take note that a share is whole and stays as it is."""
        with self._changed:
            if found := self._register.find(ticket):
                entry, share = found
                self._announce(entry, share, ticket.rank, tuple(range(len(share.plan.slots))))
                share.writing = Writing.SEALED
                if entry.is_captured and entry.is_live:
                    self._num_captured += 1
                    entry.num_captured = self._num_captured
                    entry.is_held = entry.is_to_be_held
                    if entry.is_held:
                        self._undigested.append(entry)
                self._advance(entry)

    def spoil(self, ticket: Ticket, why: str) -> None:
        """Give a share up, and with it its snapshot."""
        with self._changed:
            if found := self._register.find(ticket):
                entry, share = found
                share.writing = Writing.GONE
                self._fail(entry, why)

    def leave(self, owner: object, why: str) -> None:
        """Give up what an owner that is gone had not sealed."""
        with self._changed:
            for entry in self._register:
                for share in entry.shares.values():
                    if share.owner is owner and share.writing is Writing.OPEN:
                        share.writing = Writing.GONE
                        self._fail(entry, why)

    def abandon(self, why: str) -> None:
        """Give up every snapshot that is not captured: nobody is left who could deliver the rest."""
        with self._changed:
            for entry in self._register.live():
                if not entry.is_captured:
                    self._fail(entry, f"{entry.missing()}: {why}")

    def end(self, why: str) -> None:
        """Take no new snapshot from now on, and give up those that are not captured."""
        with self._changed:
            self._why_ending = why
            self.abandon(why)

    def go_on(self) -> None:
        """Take snapshots again: the end was called off."""
        with self._changed:
            self._why_ending = None

    def drain(self, timeout_s: float) -> bool:
        """Wait until every captured snapshot has its outcome, or none will come; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_closed or not self.num_unfinished, timeout_s)

    def settle(self, above: int, timeout_s: float, *, patience_s: float) -> tuple[int, ...]:
        """Wait until what is under way above a step is over, as `await_end` says; return what is not."""
        with self._changed:
            live = self._register.live()
            return await_end(live, above, self._changed, timeout_s=timeout_s, patience_s=patience_s)

    @property
    def num_unfinished(self) -> int:
        """How many snapshots are captured and have no outcome yet."""
        with self._changed:
            return sum(entry.is_captured for entry in self._register.live())

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken or given."""
        return self._is_closed

    @property
    def leads(self) -> bool:
        """Whether the first rank of the newest world lives here: its host does what one host has to do."""
        return self._reign.leader == self.host

    @property
    def pressure(self) -> Pressure:
        """How tight memory has been so far."""
        with self._changed:
            return self._room.pressure

    def close(self) -> None:
        """Take and give nothing more; who waits is let go."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self.board.close()

    def next_work(self, timeout_s: float | None) -> Work | None:
        """Wait for the next chunks to digest, or a snapshot's end; None after `close`, or if time ran out."""
        with self._changed:
            self._changed.wait_for(lambda: self._work or self._is_closed, timeout_s)
            while self._work and not self._is_closed:
                id_, rank, chunks = self._work.take()
                entry = self._register.get(id_)
                if entry is None or not entry.is_live:
                    continue  # it failed meanwhile
                if rank is None:
                    return Work(entry, None)
                share = entry.shares[rank]
                share.num_lent += len(chunks)
                return Work(entry, share, chunks)
            return None

    def next_undigested(self) -> SnapshotEntry | None:
        """Wait for the next snapshot that is captured, and to be held; None after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._undigested or self._is_closed)
            return None if self._is_closed else self._undigested.popleft()

    def touch(self) -> bool:
        """Prepare a piece of the arena for its first use; return whether there is more to do."""
        with self._changed:
            return not self._is_closed and self.arena.touch()

    def give_back(self, entry: SnapshotEntry, share: ShareEntry, num_chunks: int) -> None:
        """Take note that the pipeline no longer needs so many chunks of a share, whatever became of them."""
        with self._changed:
            share.num_lent -= num_chunks
            share.num_needed -= num_chunks
            self._advance(entry)

    def digested(self, entry: SnapshotEntry, image: Held) -> None:
        """Take note of what is in a snapshot that is held, and tell that memory has it."""
        with self._changed:
            entry.image = image
            if entry.is_held:
                seconds = time.monotonic() - entry.started_s
                num_bytes = sum(tensor.num_bytes for tensor in image.manifest.tensors)
                held = Durable(entry.step, entry.generation, MEMORY, num_bytes, seconds)
                if entry.depth == "memory":
                    self._end(entry, held)
                else:
                    self.board.tell(held)
            self._advance(entry)

    def fail(self, entry: SnapshotEntry, why: str) -> None:
        """End a snapshot that will not become a checkpoint."""
        with self._changed:
            self._fail(entry, why)

    def forget(self, entry: SnapshotEntry, why: str) -> None:
        """End a snapshot, if that is still to be, and do not hold it either."""
        with self._changed:
            entry.is_held = False
            self._fail(entry, why)

    def complete(self, entry: SnapshotEntry, outcome: Durable) -> None:
        """End a snapshot that has become a checkpoint."""
        with self._changed:
            entry.is_durable = True
            self._end(entry, outcome)

    def failures(self) -> list[SnapshotEntry]:
        """Return (once) the snapshots that failed."""
        with self._changed:
            failed, self._failed = self._failed, []
            return failed

    def expire(self, patience_s: float, straggler_s: float) -> None:
        """Give up what a local rank owes for `patience_s`, or for `straggler_s` since a newer world saved.

        All living ranks are in the newer world; what is still owed to an older one is a last capture in hand,
        or a dead rank's.
        """
        with self._changed:
            for entry, limit_s in self._register.overdue(self._reign, patience_s, straggler_s):
                self._fail(entry, f"{entry.missing()} within {limit_s:.0f} s")

    def _admit(self, ticket: Ticket, plan: SnapshotPlan) -> SnapshotEntry | None:
        entry = self._register.enter(ticket, plan)
        entry.is_to_be_held = self.hold > 0
        why = self._why_ending or objection(entry, ticket.rank, plan)
        if entry.depth == "memory" and not self.hold:
            why = f"host {self.host} holds no snapshots in memory: give it a `hold` of 1 or more"
        if why:
            self._fail(entry, why)
        return entry if entry.why_failed is None else None

    def _await_room(self, entry: SnapshotEntry, plan: SnapshotPlan) -> Region | None:
        """Lend a region, making room or waiting for it; None if the snapshot is over before there is any."""
        began_s = time.monotonic()
        patience_s = 0.0 if plan.handling.when_full == "skip" else plan.handling.max_wait_s
        has_waited = False
        while (region := self._room.lend(plan.num_bytes, entry, list(self._register))) is None:
            remaining_s = began_s + patience_s - time.monotonic()
            if remaining_s <= 0:
                self._room.note_skip()
                self._end(entry, Skipped(entry.step, entry.generation, self._room.fullness(plan)))
            else:
                has_waited = True
                self._changed.wait(min(remaining_s, 1.0))
            if entry.why_failed is not None or self._is_closed:
                break
        if has_waited:
            self._room.note_wait(time.monotonic() - began_s)
        self._register.sweep()
        return region

    def _supersede(self, ticket: Ticket) -> None:
        """A rank that goes on to a newer step of its world will not deliver an older one."""
        for entry in self._register.live():
            is_older = entry.generation == ticket.generation and entry.step < ticket.step
            share = entry.shares.get(ticket.rank)
            if is_older and (share is None or share.writing is not Writing.SEALED):
                self._fail(entry, f"rank {ticket.rank} went on to step {ticket.step} without delivering")

    def _announce(self, entry: SnapshotEntry, share: ShareEntry, rank: int, chunks: tuple[int, ...]) -> None:
        new = [chunk for chunk in chunks if chunk not in share.announced]
        if not new or entry.why_failed is not None:
            return
        share.announced.update(new)
        if entry.depth == "memory":
            return
        share.num_needed += len(new)
        self._work.add(entry, rank, new)
        self._changed.notify_all()

    def _advance(self, entry: SnapshotEntry) -> None:
        """Do what a change of a snapshot made possible: let others go, free regions, hand out its end."""
        self._let_excess_go()
        self._room.free(entry)
        if entry.is_captured and entry.is_live and entry.depth == "store" and not entry.is_handed_out:
            entry.is_handed_out = True
            self._work.add_end(entry)
        self._register.sweep()
        self._changed.notify_all()

    def _let_excess_go(self) -> None:
        for one in choose_excess(self._register.held(), self.hold):
            one.is_held = False
            self._room.free(one)

    def _fail(self, entry: SnapshotEntry, why: str) -> None:
        if entry.is_live:
            log.error("checkpoint of step %d failed: %s", entry.step, why)
            self._end(entry, Failed(entry.step, entry.generation, why))
        self._advance(entry)

    def _end(self, entry: SnapshotEntry, outcome: Outcome) -> None:
        """Publish the one outcome of a snapshot, and forget it as soon as its regions are free."""
        if not entry.is_live:
            return
        entry.is_live = False
        self._register.note_end(entry, outcome)
        if not isinstance(outcome, Durable):
            entry.why_failed = outcome.why
            self._failed.append(entry)
        self.board.tell(outcome)
        self._advance(entry)
