"""Retention: what no policy keeps goes; the newest never does, nor what may still be needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.engine.catalog import Catalog
from checkpoint.errors import StoreUnavailable
from checkpoint.format.keys import manifest_key, pack_key, page_key
from checkpoint.lifecycle.retention import EverySteps, LatestN, Pinned, expired, prune
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import Faulty, Lost
from tests.format_samples import write_checkpoint

GRACE_S = 600.0
NOW_S = 10_000.0


@pytest.fixture
def store() -> MemoryStore:
    """Checkpoints of steps 10, 20, ..., 60, written a while ago."""
    store = MemoryStore(clock=lambda: NOW_S - 60)
    for step in range(10, 70, 10):
        write_checkpoint(store, step)
        store.put(page_key(1, step, "h0", 0), b"a receipt")
    return store


def test_what_no_policy_keeps_expires():
    steps = range(10, 110, 10)
    assert expired(steps, [LatestN(3)]) == [10, 20, 30, 40, 50, 60, 70]
    assert expired(steps, [LatestN(1), EverySteps(50)]) == [10, 20, 30, 40, 60, 70, 80, 90]
    assert expired(steps, [LatestN(1), Pinned(frozenset({20, 999}))]) == [10, 30, 40, 50, 60, 70, 80, 90]
    assert expired([], [LatestN(1)]) == []


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 50), st.sets(st.integers(0, 200)))
def test_the_newest_and_the_protected_never_expire(steps, k, protect):
    gone = expired(steps, [EverySteps(k)], protect=protect)
    assert max(steps) not in gone
    assert not protect & set(gone)
    assert set(gone) <= steps


def test_no_policy_is_no_licence_to_delete():
    with pytest.raises(ValueError, match="at least one"):
        expired([1, 2], [])
    for make in (lambda: LatestN(0), lambda: EverySteps(0)):
        with pytest.raises(ValueError, match="keeps"):
            make()


def test_a_prune_removes_expired_checkpoints_with_all_their_objects(store):
    report = prune(store, [LatestN(2), EverySteps(30)], now_s=NOW_S, grace_s=GRACE_S)
    assert (report.kept, report.expired, report.problems) == ((30, 50, 60), (10, 20, 40), ())
    assert Catalog(store).steps() == [30, 50, 60]
    assert verify(store).is_sound
    assert len(store.list("packs/")) == 3
    assert [entry.key for entry in store.list("index/")] == [
        page_key(1, step, "h0", seq) for step in (30, 50, 60) for seq in (0, 1)
    ]
    assert len(report.removed) == 3 * 4
    assert report.num_bytes > 0
    assert all("expired" in one.why for one in report.removed)


def test_a_second_prune_finds_nothing_to_do(store):
    prune(store, [LatestN(2)], now_s=NOW_S, grace_s=GRACE_S)
    assert prune(store, [LatestN(2)], now_s=NOW_S, grace_s=GRACE_S).removed == ()


def test_what_no_manifest_names_goes_after_the_grace_and_not_before(store):
    store.put(pack_key(2, "h1", 0), b"on its way into a checkpoint")
    assert prune(store, [LatestN(9)], now_s=NOW_S, grace_s=GRACE_S).removed == ()
    removed = prune(store, [LatestN(9)], now_s=NOW_S + GRACE_S, grace_s=GRACE_S).removed
    assert pack_key(2, "h1", 0) in {one.key for one in removed}
    assert all("orphan" in one.why for one in removed)
    assert verify(store).is_sound


def test_the_newest_checkpoint_that_has_all_its_objects_is_kept_too(store):
    for step in (50, 60):
        store.delete(Catalog(store).manifest(step).packs[0].key)
    report = prune(store, [LatestN(1)], now_s=NOW_S, grace_s=GRACE_S)
    assert report.kept == (40, 60)
    assert verify(store, 40).is_sound


def test_while_a_manifest_cannot_be_read_what_it_may_name_is_left_alone(store):
    data = bytes(store.read(manifest_key(60))[0])
    store.put(manifest_key(60), data[:-1])
    report = prune(store, [LatestN(1)], now_s=NOW_S + 10 * GRACE_S, grace_s=GRACE_S)
    assert manifest_key(60) in report.problems[0]
    assert len(store.list("packs/")) == 6
    assert Catalog(store).steps() == [50, 60]
    store.put(manifest_key(60), data)
    assert prune(store, [LatestN(1)], now_s=NOW_S + 10 * GRACE_S, grace_s=GRACE_S).problems == ()
    assert verify(store).is_sound
    assert len(store.list("packs/")) == 1


@pytest.mark.parametrize("nth", range(1, 13))
def test_a_prune_that_breaks_off_anywhere_destroys_nothing_and_is_finished_later(store, nth: int):
    with pytest.raises(StoreUnavailable):
        prune(Faulty(store, [Lost("delete", nth)]), [LatestN(3)], now_s=NOW_S, grace_s=GRACE_S)
    assert verify(store).is_sound
    prune(store, [LatestN(3)], now_s=NOW_S + GRACE_S, grace_s=GRACE_S)
    assert Catalog(store).steps() == [40, 50, 60]
    assert [len(store.list(prefix)) for prefix in ("packs/", "manifests/")] == [3, 3]
    assert verify(store).is_sound
