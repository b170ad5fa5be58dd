"""Waiting for snapshots under way, before somebody looks which checkpoints there are."""

from collections.abc import Sequence
from threading import Condition

from checkpoint.engine.ledger import SnapshotEntry

_CAPTURE_S = 3.0  # a capture in hand is over by then, or its rank is gone


def await_end(
    entries: Sequence[SnapshotEntry], above: int, changed: Condition, timeout_s: float
) -> tuple[int, ...]:
    """Wait, holding `changed`, until snapshots above a step are over; return the captured steps that are not.

    What is being captured now is waited for as well, but not for long.
    """
    found = [one for one in entries if one.step > above]
    changed.wait_for(
        lambda: all(one.is_captured or not one.is_live for one in found), min(timeout_s, _CAPTURE_S)
    )
    changed.wait_for(lambda: not _under_way(found), timeout_s)
    return _under_way(found)


def _under_way(entries: Sequence[SnapshotEntry]) -> tuple[int, ...]:
    return tuple(one.step for one in entries if one.is_captured and one.is_live)
