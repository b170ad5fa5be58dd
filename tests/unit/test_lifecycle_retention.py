"""Retention: what no policy keeps goes, later its objects; what may still be needed never does."""

from dataclasses import replace

import pytest

from checkpoint.engine.catalog import Catalog, read_manifest
from checkpoint.errors import NoCheckpoint, StoreUnavailable
from checkpoint.format.keys import (
    EXPIRED,
    SCORES,
    SWEEPS,
    VERIFIED,
    expired_key,
    manifest_key,
    pack_key,
    page_key,
)
from checkpoint.format.manifest import encode_manifest
from checkpoint.lifecycle.marks import record_score, record_verified, scores, tag, tags, untag
from checkpoint.lifecycle.policies import BestByMetric, EverySteps, LatestN, WithinBytes
from checkpoint.lifecycle.retention import PruneReport, prune
from checkpoint.lifecycle.scrub import verify
from checkpoint.lifecycle.survey import digest_of
from checkpoint.store.memory import MemoryStore
from tests.format_samples import write_checkpoint
from tests.wrapped_stores import Faulty, Lost

GRACE_S, LINGER_S = 600.0, 60.0
STEPS = (10, 20, 30, 40, 50, 60)


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now_s = 10_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock) -> MemoryStore:
    """Checkpoints of steps 10, 20, ..., 60, written a while ago, with their receipts."""
    store = MemoryStore("aging", clock=clock)
    for step in STEPS:
        write_checkpoint(store, step)
        store.put(page_key(1, step, "h0", 0), b"a receipt")
    clock.now_s += LINGER_S
    return store


@pytest.fixture
def age(store, clock):
    """Prune by some policies, so many seconds later."""

    def pruned(*policies, later_s: float = 0.0) -> PruneReport:
        clock.now_s += later_s
        return prune(store, policies, now_s=clock.now_s, grace_s=GRACE_S, linger_s=LINGER_S)

    return pruned


def num_objects(store: MemoryStore) -> dict[str, int]:
    return {prefix: len(store.list(f"{prefix}/")) for prefix in ("manifests", "packs", "index")}


def mark_verified(store: MemoryStore, step: int) -> None:
    record_verified(store, step, digest_of(read_manifest(store, step)[1]), 1)


def test_an_expired_checkpoint_is_gone_at_once_and_its_objects_after_the_linger(store, age):
    report = age(LatestN(2), EverySteps(30))
    assert (report.kept, report.expired, report.problems) == ((30, 50, 60), (10, 20, 40), ())
    assert Catalog(store).steps() == [30, 50, 60]
    assert num_objects(store) == {"manifests": 3, "packs": 6, "index": 9}
    assert report.num_waiting_bytes > 0 and all("expired" in one.why for one in report.removed)
    assert age(LatestN(9), later_s=LINGER_S).removed == ()
    later = age(LatestN(9), later_s=1)
    assert num_objects(store) == {"manifests": 3, "packs": 3, "index": 6}
    assert (later.num_waiting_bytes, later.num_bytes) == (0, report.num_waiting_bytes)
    assert {one.why for one in later.removed} >= {
        f"it belonged to step {step}, which expired" for step in (10, 20, 40)
    }
    assert not store.list(EXPIRED) and not store.list(SWEEPS)
    assert verify(store).is_sound


def test_the_report_says_of_each_checkpoint_why_it_stays_or_goes(store, age):
    tag(store, "release", 20)
    report = age(LatestN(2), EverySteps(30))
    assert {one.step: one.why for one in report.verdicts} == {
        10: "expired: kept are the newest 2 and every 30 steps",
        20: "tagged release",
        30: "every 30 steps",
        40: "expired: kept are the newest 2 and every 30 steps",
        50: "the newest 2",
        60: "the newest that has all of its objects",
    }


def test_without_grace_all_of_it_goes_at_once(store, clock):
    store.put(pack_key(2, "h1", 0), b"left behind")
    report = prune(store, [LatestN(2)], now_s=clock.now_s, grace_s=0)
    assert report.expired == (10, 20, 30, 40)
    assert num_objects(store) == {"manifests": 2, "packs": 2, "index": 2}
    assert not store.list(EXPIRED) and verify(store).is_sound


@pytest.mark.parametrize(("grace_s", "linger_s"), [(GRACE_S, 60.0), (20.0, 20.0)])
def test_a_linger_is_a_minute_and_never_longer_than_the_grace(store, clock, grace_s, linger_s):
    for later_s, num_packs in ((0, 6), (linger_s, 6), (1, 2)):
        clock.now_s += later_s
        prune(store, [LatestN(2)], now_s=clock.now_s, grace_s=grace_s)
        assert num_objects(store)["packs"] == num_packs


def test_a_second_prune_finds_nothing_to_do(store, age):
    age(LatestN(2))
    age(LatestN(2), later_s=LINGER_S + 1)
    assert {one.why for one in age(LatestN(2), later_s=GRACE_S).removed} == {
        "a receipt: nothing has needed it for 600 s"
    }
    assert age(LatestN(2), later_s=GRACE_S + 1).removed == ()


def test_what_no_manifest_names_goes_after_the_grace_and_not_before(store, age):
    for entry in store.list("index/"):
        if entry.key.endswith("-0000"):
            store.delete(entry.key)
    store.put(pack_key(2, "h1", 0), b"on its way into a checkpoint")
    assert age(LatestN(9), later_s=GRACE_S).removed == ()
    (removed,) = age(LatestN(9), later_s=1).removed
    assert removed.key == pack_key(2, "h1", 0) and "orphan" in removed.why
    assert verify(store).is_sound


def test_a_pack_s_key_that_is_used_anew_does_not_go_with_the_old_checkpoint(store, age, clock):
    key = Catalog(store).manifest(10).packs[0].key
    age(LatestN(5))
    store.delete(key)  # as by a sweep that broke off
    clock.now_s += 10
    store.put(key, b"of a snapshot under way, after its keeper started anew")
    age(LatestN(5), later_s=LINGER_S)
    assert len(store.list("packs/")) == 6
    age(LatestN(5), later_s=GRACE_S)
    assert len(store.list("packs/")) == 5


def test_the_newest_checkpoint_that_has_all_its_objects_is_kept_too(store, age):
    for step in (50, 60):
        store.delete(Catalog(store).manifest(step).packs[0].key)
    assert age(LatestN(1)).kept == (40, 60)
    age(LatestN(1), later_s=GRACE_S + 1)
    assert verify(store, 40).is_sound


def test_the_newest_verified_checkpoint_is_kept_too_and_no_other_one_of_them(store, age):
    mark_verified(store, 20)
    mark_verified(store, 30)
    assert age(LatestN(1)).kept == (30, 60)
    mark_verified(store, 60)
    assert age(LatestN(1)).kept == (60,)
    age(LatestN(1), later_s=LINGER_S + 1)
    assert len(store.list(VERIFIED)) == 1


def test_a_proof_of_another_checkpoint_of_the_same_step_protects_nothing(store, age):
    record_verified(store, 30, "0123456789abcdef", 1)
    assert age(LatestN(1)).kept == (60,)


def test_an_expiry_that_broke_off_and_was_thought_better_of_leaves_the_proof(store, age, clock):
    mark_verified(store, 20)
    mark_verified(store, 60)
    with pytest.raises(StoreUnavailable):
        prune(Faulty(store, [Lost("delete", 3)]), [LatestN(1)], now_s=clock.now_s, grace_s=GRACE_S)
    assert Catalog(store).steps()[0] == 20 and len(store.list(EXPIRED)) == 4
    age(LatestN(9), later_s=LINGER_S + 1)
    assert not store.list(EXPIRED) and len(store.list(VERIFIED)) == 2
    assert verify(store).steps == (60, 50, 40, 30, 20)


def test_a_budget_never_costs_the_newest_verified_nor_what_is_tagged(store, age):
    mark_verified(store, 30)
    tag(store, "best", 10)
    report = age(LatestN(4), WithinBytes(1))
    assert report.kept == (10, 30, 60)
    assert "to keep the store within 1 bytes" in next(one.why for one in report.verdicts if one.step == 50)


def test_the_reason_of_an_expiry_that_another_prune_had_done_with_goes_after_the_grace(store, age):
    reason = f"{expired_key(10, 'f' * 16)}.json"
    store.put(reason, b"{}")
    age(LatestN(9), later_s=GRACE_S)
    assert [entry.key for entry in store.list(EXPIRED)] == [reason]
    age(LatestN(9), later_s=1.0)
    assert store.list(EXPIRED) == []


def test_a_tag_keeps_its_checkpoint_until_it_is_taken_away_or_moved(store, age):
    tag(store, "best", 10)
    tag(store, "release", 20)
    assert tags(store) == {"best": 10, "release": 20}
    assert age(LatestN(1)).kept == (10, 20, 60)
    tag(store, "best", 20)
    untag(store, "release")
    untag(store, "unheard-of")
    assert age(LatestN(1)).kept == (20, 60)
    with pytest.raises(NoCheckpoint, match="step 10"):
        tag(store, "best", 10)
    assert tags(store) == {"best": 20}


def test_a_tag_that_comes_while_its_checkpoint_expires_brings_it_back(store, clock):
    class Tagging(MemoryStore):
        def delete(self, key: str) -> None:
            super().delete(key)
            if key == manifest_key(20):
                self.put("control/tags/best", b'{"step":20}')

    late = Tagging("late", clock=clock)
    for entry in store.list(""):
        late.put(entry.key, store.read(entry.key)[0])
    report = prune(late, [LatestN(1)], now_s=clock.now_s, grace_s=GRACE_S, linger_s=0)
    assert report.kept == (20, 60)
    assert verify(late, 20).is_sound


def test_scores_decide_which_is_the_best_and_go_with_their_checkpoint(store, age):
    for step in STEPS:
        record_score(store, step, {"loss": abs(step - 20.0), "accuracy": step})
    record_score(store, 40, {"loss": -1.0})
    assert scores(store, 40, digest_of(read_manifest(store, 40)[1])) == {"loss": -1.0, "accuracy": 40.0}
    assert age(LatestN(1), BestByMetric("loss", "min", 2)).kept == (20, 40, 60)
    for _ in range(2):
        age(LatestN(1), later_s=LINGER_S + 1)
    assert [entry.key[len(SCORES) :][:12] for entry in store.list(SCORES)] == ["000000000060"]
    with pytest.raises(NoCheckpoint):
        record_score(store, 10, {"loss": 0.0})


def test_while_a_manifest_cannot_be_read_what_it_may_name_is_left_alone(store, age):
    data = bytes(store.read(manifest_key(60))[0])
    store.put(manifest_key(60), data[:-1])
    report = age(LatestN(1), later_s=10 * GRACE_S)
    assert manifest_key(60) in report.problems[0]
    age(LatestN(1), later_s=10 * GRACE_S)
    assert len(store.list("packs/")) == 6
    assert Catalog(store).steps() == [50, 60]
    store.put(manifest_key(60), data)
    age(LatestN(1))
    assert age(LatestN(1), later_s=LINGER_S + 1).problems == ()
    assert verify(store).is_sound
    assert len(store.list("packs/")) == 1


def test_while_an_expired_manifest_cannot_be_read_its_objects_wait_for_the_grace(store, age):
    age(LatestN(5))
    (grave,) = [entry.key for entry in store.list(EXPIRED) if not entry.key.endswith(".json")]
    store.put(grave, b"damaged")
    age(LatestN(5), later_s=LINGER_S + 1)
    assert len(store.list("packs/")) == 6
    age(LatestN(5), later_s=GRACE_S)
    assert len(store.list("packs/")) == 5 and not store.list(EXPIRED)


def test_while_a_receipt_of_a_save_under_way_cannot_be_read_nothing_is_swept(store, age):
    age(LatestN(5))
    store.put(page_key(2, 70, "h0", 0), b"damaged")
    report = age(LatestN(5), later_s=GRACE_S)
    assert len(store.list("packs/")) == 6 and page_key(2, 70, "h0", 0) in report.problems[0]
    assert not store.list(SWEEPS)
    age(LatestN(5), later_s=1)
    assert len(store.list("packs/")) == 5


@pytest.mark.parametrize("verb", ["put", "put_new", "delete"])
def test_a_prune_that_breaks_off_anywhere_destroys_nothing_and_is_finished_later(store, clock, verb):
    nth = 0
    while True:
        nth += 1
        try:
            prune(
                Faulty(store, [Lost(verb, nth)]),
                [LatestN(3)],
                now_s=clock.now_s,
                grace_s=GRACE_S,
                linger_s=LINGER_S,
            )
        except StoreUnavailable:
            assert verify(store).is_sound
            clock.now_s += LINGER_S + 1
        else:
            if nth > 30:
                break
    prune(store, [LatestN(3)], now_s=clock.now_s + 2 * GRACE_S, grace_s=GRACE_S)
    assert Catalog(store).steps() == [40, 50, 60]
    assert num_objects(store)["packs"] == num_objects(store)["manifests"] == 3
    assert not store.list(EXPIRED) and not store.list(SWEEPS)
    assert verify(store).is_sound


def test_a_prune_on_behalf_of_a_run_leaves_the_others_alone_and_says_whose_they_are(store, clock):
    for step in (70, 80):
        mine = replace(write_checkpoint(store, step), run="mine")
        store.put(manifest_key(step), encode_manifest(mine))
    report = prune(store, [LatestN(1)], now_s=clock.now_s, grace_s=GRACE_S, run="mine")
    assert report.expired == (70,) and Catalog(store).steps() == [*STEPS, 80]
    assert {run for step, run in report.runs.items() if step > 60} == {"mine"} and len(report.runs) == 8
    assert report.verdicts[0].why == f"of another run, {report.runs[10]!r}"
