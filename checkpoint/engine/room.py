"""Room in the arena: lent to shares, and made by letting held snapshots go; and how tight it has been.

Not thread-safe: its owner holds a lock around every call.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from checkpoint.engine.arena import Arena, Region, Sizing, aligned
from checkpoint.engine.contract import Pressure, SnapshotPlan
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.errors import ArenaFull

log = logging.getLogger("holdfast.checkpoint")

_BARE = (
    "memory holds no snapshot until step %d is captured: the arena has no room for both. "
    "Raise %s to (hold + 1) times the host's share of the state"
)


class Room:
    """An arena, and the snapshots in it."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.pressure = Pressure(arena.num_bytes)

    def adopt(self, num_bytes: int, sizing: Sizing) -> None:
        """Let the arena be of a size at least, and of another sizing. Raises `ArenaFull`."""
        self._arena.sizing = sizing
        self._arena.grow(num_bytes)
        self.pressure = replace(self.pressure, arena_bytes=self._arena.num_bytes)

    def provide(self, num_bytes: int, num_shares: int) -> None:
        """Let an arena that may grow have room for so many shares. Raises `ArenaFull` if not even for one."""
        wanted = aligned(num_bytes) * num_shares
        if self._arena.sizing.growth == "fixed" or wanted <= self._arena.num_bytes:
            return
        try:
            self._arena.grow(wanted)
        except ArenaFull as error:
            if aligned(num_bytes) > self._arena.num_bytes:
                raise
            log.warning("captures will wait for each other: %s", error)
        self.pressure = replace(self.pressure, arena_bytes=self._arena.num_bytes)

    def lend(self, num_bytes: int, opening: SnapshotEntry, entries: Sequence[SnapshotEntry]) -> Region | None:
        """Lend a region to a snapshot, in place of held ones if need be; None while there is no room.

        Raises `ArenaFull` when even the empty arena could not hold so much.
        """
        region = self._arena.reserve(num_bytes)
        if region is None:
            victims = choose_victims(opening, entries)
            regions = [share.region for victim in victims for share in victim.shares.values()]
            if not self._arena.would_fit(num_bytes, regions):
                return None
            newest = in_order(entries)[-1]
            while (region := self._arena.reserve(num_bytes)) is None:
                victim = victims.pop(0)
                if victim is newest and not victim.is_durable:
                    self._note_bare(opening.step)
                victim.is_held = False
                self.free(victim)
        most_bytes = max(self.pressure.most_bytes, self._arena.num_lent_bytes)
        self.pressure = replace(self.pressure, most_bytes=most_bytes)
        return region

    def free(self, entry: SnapshotEntry) -> None:
        """Take back what nobody needs of a snapshot's regions."""
        for region in entry.releasable():
            self._arena.release(region)

    def note_wait(self, seconds: float) -> None:
        """Count that somebody waited for room."""
        num_waits, waited_s = self.pressure.num_waits + 1, self.pressure.waited_s + seconds
        self.pressure = replace(self.pressure, num_waits=num_waits, waited_s=waited_s)

    def note_skip(self) -> None:
        """Count that a snapshot was given up for want of room."""
        self.pressure = replace(self.pressure, num_skipped=self.pressure.num_skipped + 1)

    def fullness(self, plan: SnapshotPlan) -> str:
        """Say why a share finds no room."""
        return (
            f"the arena is full: {self._arena.num_lent_bytes} of {self._arena.num_bytes} bytes wait to be "
            f"written, {plan.num_bytes} more are needed: raise {self._arena.sizing.setting}, or save less "
            "often"
        )

    def _note_bare(self, step: int) -> None:
        if not self.pressure.num_bare:
            log.warning(_BARE, step, self._arena.sizing.setting)
        self.pressure = replace(self.pressure, num_bare=self.pressure.num_bare + 1)


def in_order(entries: Iterable[SnapshotEntry]) -> list[SnapshotEntry]:
    """List the held ones, by generation and then as they were captured."""
    held = [entry for entry in entries if entry.is_held]
    return sorted(held, key=lambda entry: (entry.generation, entry.num_captured))


def choose_victims(opening: SnapshotEntry, entries: Sequence[SnapshotEntry]) -> list[SnapshotEntry]:
    """List the held snapshots that may make room for the one being opened, who is to go first first.

    Older ones go before newer ones. The newest goes only if a store has it, or if nothing but those that may
    go and the snapshot being opened is in the arena: then no waiting would ever make room.
    """
    held = in_order(entries)
    victims = [one for one in held if one.may_leave]
    if not victims or victims[-1] is not held[-1] or held[-1].is_durable:
        return victims
    is_all = all(one is opening or one in victims for one in entries if one.has_room)
    return victims if is_all else victims[:-1]


def choose_excess(held: Sequence[SnapshotEntry], hold: int) -> list[SnapshotEntry]:
    """List those of the held snapshots (given oldest first) that are more than are to be held.

    One that is still at work does not count: it may be stored as what differs from the one before. A guarded
    one is kept besides: only a new capture that finds no other room takes its place.
    """
    resting = [one for one in held if one.is_at_rest]
    return [one for one in resting[: max(len(resting) - hold, 0)] if one.may_leave and not one.is_guarded]
