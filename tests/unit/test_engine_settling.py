"""Who waits for snapshots under way waits as long as they come any further, and not much longer."""

from collections.abc import Callable
from threading import Condition
from typing import Any

import pytest

from checkpoint.checkpointer.hosting import settle
from checkpoint.engine.arena import Region
from checkpoint.engine.contract import Content, Handling, SnapshotPlan
from checkpoint.engine.ledger import Flight, ShareEntry, SnapshotEntry, Writing
from checkpoint.engine.settling import await_end
from checkpoint.format.codec import Codec


class Scripted(Condition):
    """A condition whose every wait sees the next thing happen, until nothing does any more."""

    def __init__(self, *moves: Callable[[], object]) -> None:
        super().__init__()
        self.moves, self.waits_s = list(moves), list[float]()

    def wait_for(self, predicate, timeout=None):
        self.waits_s.append(timeout)
        if not predicate() and self.moves:
            self.moves.pop(0)()
        return predicate()


@pytest.fixture
def entry() -> SnapshotEntry:
    """A captured snapshot of which two chunks are still to be written."""
    content = Content((), "{}", "digest")
    plan = SnapshotPlan(("h0",), content, {}, Handling(Codec.RAW, 1, "wait", 1.0), ())
    entry = SnapshotEntry((1, 7), "run", ("h0",), "h0", content, "store", 0.0)
    entry.shares[0] = ShareEntry(plan, Region(0, 0), object(), writing=Writing.SEALED, num_needed=2)
    return entry


def test_a_snapshot_that_comes_further_is_waited_for_beyond_the_patience(entry):
    (share,) = entry.shares.values()

    def write() -> None:
        share.num_needed -= 1

    def end() -> None:
        entry.is_live = False

    changed = Scripted(write, write, end)
    assert await_end([entry], 6, changed, timeout_s=600.0, patience_s=5.0) == ()
    assert changed.waits_s[1:] == [5.0, 5.0, 5.0] and not changed.moves


def test_a_snapshot_that_comes_no_further_is_given_up_after_one_patience(entry):
    (share,) = entry.shares.values()

    def write() -> None:
        share.num_needed -= 1

    changed = Scripted(write)
    assert await_end([entry], 6, changed, timeout_s=600.0, patience_s=5.0) == (7,)
    assert changed.waits_s[1:] == [5.0, 5.0]


def test_no_patience_outlasts_the_time_that_there_is(entry):
    changed = Scripted()
    assert await_end([entry], 6, changed, timeout_s=0.5, patience_s=5.0) == (7,)
    assert max(changed.waits_s) <= 0.5
    assert await_end([entry], 7, changed, timeout_s=0.5, patience_s=5.0) == ()


def test_packs_that_a_store_is_being_given_are_waited_for_as_long_as_a_slow_store_takes(entry):
    def begin() -> None:
        entry.flying["packs/one"] = Flight(64 << 20, 1000.0)

    def end() -> None:
        entry.is_live = False

    changed = Scripted(begin, end)
    assert await_end([entry], 6, changed, timeout_s=600.0, patience_s=5.0, clock=lambda: 1000.0) == ()
    assert changed.waits_s[1:] == [5.0, 5.0 + 16.0]


@pytest.mark.parametrize(("begun_ago_s", "waited_s"), [(10.0, 5.0 + 6.0), (16.0, 5.0), (600.0, 5.0)])
def test_packs_that_even_a_slow_store_would_have_had_long_ago_are_not_waited_for(
    entry, begun_ago_s, waited_s
):
    begun_s = 1000.0 - begun_ago_s
    entry.flying["packs/one"] = Flight(48 << 20, begun_s - 100.0)
    entry.flying["packs/two"] = Flight(16 << 20, begun_s)
    changed = Scripted()
    assert await_end([entry], 6, changed, timeout_s=600.0, patience_s=5.0, clock=lambda: 1000.0) == (7,)
    assert changed.waits_s[1:] == [waited_s]


class Lone:
    """A host whose snapshot is over when it is asked for the second time, and a world of it and another."""

    def __init__(self, others: list[tuple[int, ...]]) -> None:
        self.others, self.waits_s = others, list[float]()

    def settle(self, above, timeout_s, *, patience_s):
        self.waits_s.append(timeout_s)
        return (7,) if len(self.waits_s) == 1 else ()

    def everybody(self, left):
        return [left, self.others.pop(0)]


@pytest.mark.parametrize(("others", "left"), [([(), ()], ()), ([(7,)], (7,))])
def test_a_host_that_waited_for_anothers_part_waits_once_more_when_that_is_done(others, left):
    one: Any = Lone(others)
    assert settle(one, 6, one, timeout_s=1.0, patience_s=0.5) == left
    assert not one.others and all(0 < each <= 1.0 for each in one.waits_s)
