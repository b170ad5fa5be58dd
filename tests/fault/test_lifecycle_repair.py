"""Repair: what is damaged on one tier is mended from another, proved before it replaces anything."""

import pytest

from checkpoint.engine.catalog import Catalog
from checkpoint.errors import NoCheckpoint, StoreUnavailable
from checkpoint.format.keys import DAMAGED, PROMOTING, manifest_key
from checkpoint.lifecycle import findings
from checkpoint.lifecycle.marks import verified
from checkpoint.lifecycle.promotion import promote
from checkpoint.lifecycle.repair import repair
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.memory import MemoryStore
from tests.lifecycle_worlds import save, write_chain
from tests.wrapped_stores import Faulty, Lost

STEP = 3


@pytest.fixture
def near() -> MemoryStore:
    store = MemoryStore("near")
    write_chain(store, STEP)
    return store


@pytest.fixture
def far(near) -> MemoryStore:
    store = MemoryStore("far")
    promote(near, store, STEP)
    return store


def keys(store: MemoryStore) -> list[str]:
    manifest = Catalog(store).manifest(STEP)
    return [
        manifest_key(STEP),
        *(page.key for page in manifest.pages),
        *(pack.key for pack in manifest.packs),
    ]


def flip(store: MemoryStore, key: str) -> None:
    data = bytearray(store.read(key)[0])
    data[len(data) // 3] ^= 8
    store.put(key, data)


def cut(store: MemoryStore, key: str) -> None:
    store.put(key, bytes(store.read(key)[0])[:-7])


def lose(store: MemoryStore, key: str) -> None:
    store.delete(key)


def empty(store: MemoryStore, key: str) -> None:
    store.put(key, b"")


@pytest.mark.parametrize("damage", [flip, cut, lose, empty])
@pytest.mark.parametrize("which", range(5))
def test_whatever_one_object_lacks_is_fetched_from_the_other_store(near, far, damage, which):
    key = keys(near)[which]
    good = bytes(near.read(key)[0])
    damage(near, key)
    report = repair(near, STEP, far)
    assert report.is_sound and report.mended == (key,) and report.problems == ()
    assert bytes(near.read(key)[0]) == good
    assert verify(near).is_sound and near.list(PROMOTING) == []
    assert {step for step, _ in verified(near)} >= {STEP}
    assert bool(near.list(DAMAGED)) == (which == 0 and damage is not lose)


def test_all_objects_at_once_are_mended(near, far):
    for key in keys(near):
        lose(near, key)
    report = repair(near, STEP, far)
    assert report.is_sound and set(report.mended) == set(keys(near))


def test_a_sound_checkpoint_is_left_as_it_is(near, far):
    before = {entry.key: bytes(near.read(entry.key)[0]) for entry in near.list("")}
    assert repair(near, STEP, far).mended == ()
    assert before.items() <= {entry.key: bytes(near.read(entry.key)[0]) for entry in near.list("")}.items()


@pytest.mark.parametrize("which", [1, 2, 4])
def test_a_copy_that_is_damaged_as_well_replaces_nothing_and_is_named(near, far, which):
    key = keys(near)[which]
    cut(near, key)
    left = bytes(near.read(key)[0])
    flip(far, key)
    report = repair(near, STEP, far)
    assert not report.is_sound and report.mended == () and key in report.problems[0]
    assert bytes(near.read(key)[0]) == left


def test_what_a_full_list_leaves_out_is_mended_all_the_same(monkeypatch):
    monkeypatch.setattr(findings, "MAX_LISTED", 1)
    near, far = MemoryStore("near"), MemoryStore("far")
    save(near, STEP, [1, 2, 3])
    promote(near, far, STEP)
    first, second, third = (pack.key for pack in Catalog(near).manifest(STEP).packs)
    for store, key in ((near, first), (far, first), (near, second), (near, third)):
        flip(store, key)
    report = repair(near, STEP, far)
    assert set(report.mended) == {second, third} and first in report.problems[0]
    assert report.after is not None and {bad.key for bad in report.after.bad} == {first}


def test_a_pack_of_another_run_replaces_nothing_however_sound_it_is():
    near, other = MemoryStore("near"), MemoryStore("other")
    for store, values in ((near, [1, 2]), (other, [3, 4])):
        save(store, STEP, values, life="0" * 16)
    key = Catalog(near).manifest(STEP).packs[0].key
    flip(near, key)
    report = repair(near, STEP, other)
    assert not report.is_sound and "holds other chunks" in report.problems[0]


def test_a_manifest_is_not_created_while_something_it_names_is_not_sound(near, far):
    pack = keys(near)[2]
    lose(near, manifest_key(STEP))
    lose(near, pack)
    lose(far, pack)
    report = repair(near, STEP, far)
    assert report.after is None and not report.is_sound and pack in report.problems[0]
    assert STEP not in Catalog(near).steps()


def test_without_any_manifest_there_is_nothing_to_go_by(near, far):
    flip(near, manifest_key(STEP))
    lose(far, manifest_key(STEP))
    with pytest.raises(NoCheckpoint, match="and in the other store"):
        repair(near, STEP, far)


@pytest.mark.parametrize("verb", ["put", "put_new", "delete"])
def test_a_repair_that_breaks_off_at_any_write_can_be_finished(far, verb):
    for nth in range(1, 9):
        near = MemoryStore("near")
        write_chain(near, STEP)
        for key, damage in zip(keys(near), (flip, lose, cut, empty, lose), strict=True):
            damage(near, key)
        try:
            repair(Faulty(near, [Lost(verb, nth)]), STEP, far)
        except StoreUnavailable:
            if STEP in Catalog(near).steps() and Catalog(near).latest() == STEP:
                assert verify(near, STEP).is_sound
        assert repair(near, STEP, far).is_sound
