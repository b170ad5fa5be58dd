"""Promotion: what a store holds is on the other one whole, or not at all, wherever it broke off."""

import tracemalloc

import numpy as np
import pytest

from checkpoint.engine.catalog import Catalog, read_manifest
from checkpoint.errors import Conflict, Corrupt, NoCheckpoint, StoreUnavailable
from checkpoint.format.codec import Codec
from checkpoint.format.keys import PROMOTING, manifest_key, parse_pack_key
from checkpoint.lifecycle import promotion
from checkpoint.lifecycle.marks import record_score, scores
from checkpoint.lifecycle.policies import LatestN
from checkpoint.lifecycle.promotion import promote
from checkpoint.lifecycle.retention import prune
from checkpoint.lifecycle.scrub import verify
from checkpoint.lifecycle.survey import digest_of
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from tests.format_samples import write_checkpoint
from tests.lifecycle_worlds import Clock, save
from tests.wrapped_stores import Faulty, Lost, Metered, Unanswered

GRACE_S = 600.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def near(clock) -> MemoryStore:
    """Steps 1, 2, 3 of three tensors each; one is the same in all, one in 2 and 3."""
    store = MemoryStore("near", clock=clock)
    first = save(store, 1, [1, 10, 100])
    second = save(store, 2, [1, 20, 200], first)
    assert second is not None
    third = save(store, 3, [1, 20, 300], second)
    assert third is not None and len({pack.key for pack in third.packs}) == 3
    return store


@pytest.fixture
def far(clock) -> MemoryStore:
    return MemoryStore("far", clock=clock)


def contents(store: MemoryStore) -> dict[str, bytes]:
    return {entry.key: bytes(store.read(entry.key)[0]) for entry in store.list("")}


def test_a_checkpoint_is_copied_with_the_packs_of_older_ones_that_it_names(near, far):
    report = promote(near, far, 3)
    assert (report.is_new, report.num_copied, report.num_shared) == (True, 4, 0)
    assert contents(far).items() <= contents(near).items()
    assert Catalog(far).steps() == [3] and verify(far).is_sound
    second = promote(near, far, 2)
    assert (second.is_new, second.num_copied, second.num_shared) == (True, 2, 2)
    assert verify(far).is_sound
    assert far.list(PROMOTING) == []


def test_a_second_promotion_has_nothing_to_do(near, far):
    promote(near, far, 3)
    metered = Metered(far)
    report = promote(near, metered, 3)
    assert (report.is_new, report.num_copied, report.num_bytes) == (False, 0, 0)
    assert set(metered.traffic().num_calls) == {"read"}


def test_what_checkpoints_on_both_stores_vouch_for_is_not_compared_again(near, far):
    promote(near, far, 2)
    metered = Metered(far)
    promote(near, metered, 3)
    reads = metered.traffic().num_calls["read"]
    assert reads == 3  # is it there, the manifest of step 2, and what was written read back


def test_an_equal_checkpoint_that_was_saved_there_is_as_good(near, far):
    save(far, 3, [1, 20, 300], host="other")
    assert not promote(near, far, 3).is_new


def test_another_checkpoint_of_that_step_is_a_conflict(near, far):
    save(far, 3, [7, 7, 7], host="other")
    with pytest.raises(Conflict, match="another checkpoint of step 3"):
        promote(near, far, 3)
    far.put(manifest_key(3), b"damaged")
    with pytest.raises(Conflict, match="cannot be read"):
        promote(near, far, 3)


def test_a_pack_of_another_run_under_the_same_key_is_a_conflict_though_it_is_as_long(near, far):
    named = parse_pack_key(Catalog(near).manifest(3).packs[0].key)
    assert named is not None
    save(far, 9, [5, 6, 7], life=named.life)
    with pytest.raises(Conflict, match="lists other chunks"):
        promote(near, far, 3)
    assert Catalog(far).steps() == [9] and verify(far).is_sound


@pytest.mark.parametrize("kind", ["packs", "pages"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_what_is_damaged_is_named_and_not_copied(near, far, kind, damage):
    ref = getattr(Catalog(near).manifest(3), kind)[-1]
    data = bytearray(near.read(ref.key)[0])
    data[5] ^= 4
    match damage:
        case "flip":
            near.put(ref.key, data)
        case "cut":
            near.put(ref.key, data[:-1])
        case _:
            near.delete(ref.key)
    with pytest.raises(Corrupt, match=ref.key):
        promote(near, far, 3)
    assert Catalog(far).steps() == [] and ref.key not in contents(far)
    assert promote(near, far, 2 if kind == "pages" else 1).is_new


def test_there_is_nothing_to_promote_where_there_is_no_checkpoint(near, far):
    with pytest.raises(NoCheckpoint, match="step 7"):
        promote(near, far, 7)
    assert contents(far) == {}


@pytest.mark.parametrize("fault", [Lost, Unanswered])
@pytest.mark.parametrize("verb", ["put", "put_new", "delete", "read", "list"])
def test_a_promotion_that_breaks_off_at_any_request_is_whole_or_absent_and_can_be_finished(
    clock, fault, verb, near
):
    num_broken_off = 0
    for nth in range(1, 16):
        far = MemoryStore("far", clock=clock)
        promote(near, far, 1)
        try:
            promote(near, Faulty(far, [fault(verb, nth)]), 3)
        except StoreUnavailable:
            num_broken_off += 1
        assert verify(far).is_sound
        promote(near, far, 3)
        assert Catalog(far).steps() == [1, 3] and verify(far).is_sound
        clock.now_s += 2 * GRACE_S
        prune(far, [LatestN(2)], now_s=clock.now_s, grace_s=GRACE_S)
        assert far.list(PROMOTING) == []
        assert {ref.key for step in (1, 3) for ref in Catalog(near).manifest(step).packs} == {
            entry.key for entry in far.list("packs/")
        }
    assert 1 <= num_broken_off < 15


@pytest.mark.parametrize("verb", ["read", "list"])
def test_a_source_that_fails_at_any_request_leaves_nothing_half_done(clock, verb, near):
    nth = 0
    while True:
        nth += 1
        far = MemoryStore("far", clock=clock)
        try:
            promote(Faulty(near, [Lost(verb, nth)]), far, 3)
        except StoreUnavailable:
            assert Catalog(far).steps() == []
        else:
            break
    assert verify(far).is_sound


class Pruned:
    """A store on which somebody else prunes, once, as the `nth` request begins."""

    def __init__(self, store: MemoryStore, nth: int, act) -> None:
        self._store, self._left, self._act = store, nth, act

    def __getattr__(self, verb: str):
        self._left -= 1
        if self._left == 0:
            self._act()
        return getattr(self._store, verb)


def test_a_prune_of_the_target_at_any_moment_costs_at_most_the_promotion(near, clock):
    """What an earlier promotion left is old enough to be swept just while it is to be used again."""
    outcomes = []
    for nth in range(1, 40):
        far = MemoryStore("far", clock=clock)
        with pytest.raises(StoreUnavailable):
            promote(near, Faulty(far, [Lost("put_new", 1)]), 3)
        clock.now_s += 2 * GRACE_S

        def sweep(far: MemoryStore = far) -> None:
            prune(far, [LatestN(1)], now_s=clock.now_s, grace_s=GRACE_S)

        try:
            promote(near, Pruned(far, nth, sweep), 3)
        except StoreUnavailable:
            outcomes.append("later")
            promote(near, far, 3)
        else:
            outcomes.append("done")
        assert verify(far).is_sound and Catalog(far).steps() == [3]
    assert outcomes[-1] == "done"


def test_an_announcement_that_is_about_to_be_swept_protects_nothing_and_is_not_relied_on(near, far, clock):
    with pytest.raises(StoreUnavailable):
        promote(near, Faulty(far, [Lost("list", 1)]), 3)
    clock.now_s += 2 * GRACE_S
    with pytest.raises(StoreUnavailable):
        prune(Faulty(far, [Lost("delete", 1)]), [LatestN(1)], now_s=clock.now_s, grace_s=GRACE_S)
    with pytest.raises(StoreUnavailable, match="just being pruned"):
        promote(near, far, 3)
    clock.now_s += 2 * GRACE_S
    prune(far, [LatestN(1)], now_s=clock.now_s, grace_s=GRACE_S)
    assert promote(near, far, 3).is_new and verify(far).is_sound


def test_scores_go_along(near, far):
    record_score(near, 3, {"loss": 0.25})
    promote(near, far, 3)
    assert scores(far, 3, digest_of(read_manifest(far, 3)[1])) == {"loss": 0.25}


def test_a_large_pack_is_copied_without_being_held(tmp_path, monkeypatch):
    near, far = LocalStore(tmp_path / "near"), LocalStore(tmp_path / "far")
    bits = np.arange(24 << 18, dtype=np.uint32)
    write_checkpoint(near, 1, {"x": ("float32", bits)}, codec=Codec.RAW, max_chunk_bytes=1 << 20)
    del bits
    monkeypatch.setattr(promotion, "MAX_HELD_BYTES", 1 << 20)
    monkeypatch.setattr(promotion, "_PART_BYTES", 1 << 20)
    tracemalloc.start()
    assert promote(near, far, 1).num_bytes > 24 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert verify(far).is_sound
