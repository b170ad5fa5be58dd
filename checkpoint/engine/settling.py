"""Waiting for snapshots under way, before somebody looks which checkpoints there are."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Condition

from checkpoint.engine.ledger import SnapshotEntry

_SLOWEST = 4 << 20  # bytes a second: a store slower than this is as good as silent
_CAPTURE_S = 3.0  # a capture in hand is over by then, or its rank is gone


def await_end(
    entries: Sequence[SnapshotEntry],
    above: int,
    changed: Condition,
    *,
    timeout_s: float,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, ...]:
    """Wait, holding `changed`, until snapshots above a step are over; return the captured steps that are not.

    Ends early once none of them has come any further for `patience_s`, nor for as long as a slow store takes
    for the packs that it is being given, from when it was given the last of them: nothing can be seen of a
    pack before it is whole. Then it is down, or hangs. What is being captured now is waited for as well, but
    not for long.
    """
    found = [one for one in entries if one.step > above]
    deadline_s = clock() + timeout_s
    changed.wait_for(
        lambda: all(one.is_captured or not one.is_live for one in found), min(timeout_s, _CAPTURE_S)
    )
    before: list[tuple[int, int]] = []
    while _under_way(found) and (now := _left(found)) != before:
        before, now_s = now, clock()
        slow_s = max(_due_s(found) - now_s, 0.0)
        left_s = max(deadline_s - now_s, 0.0)
        changed.wait_for(partial(_has_moved, found, now), min(patience_s + slow_s, left_s))
    return _under_way(found)


def _due_s(entries: Sequence[SnapshotEntry]) -> float:
    """Return when even a slow store has the packs that it is being given, by the monotonic clock."""
    flights = [flight for one in entries for flight in one.flights]
    latest_s = max((flight.begun_s for flight in flights), default=0.0)
    return latest_s + sum(flight.num_bytes for flight in flights) / _SLOWEST


def _has_moved(entries: Sequence[SnapshotEntry], left: Sequence[tuple[int, int]]) -> bool:
    return _left(entries) != left


def _under_way(entries: Sequence[SnapshotEntry]) -> tuple[int, ...]:
    return tuple(one.step for one in entries if one.is_captured and one.is_live)


def _left(entries: Sequence[SnapshotEntry]) -> list[tuple[int, int]]:
    """Tell how many chunks of each snapshot are still to be written, and how many bytes just are.

    A snapshot that is over has -1 chunks.
    """
    return [
        (
            sum(share.num_needed for share in one.shares.values()),
            sum(flight.num_bytes for flight in one.flights),
        )
        if one.is_live
        else (-1, 0)
        for one in entries
    ]
