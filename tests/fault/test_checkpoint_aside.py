"""A damaged checkpoint does not keep its step for ever: set aside, the step is saved anew and is sound."""

import json

import pytest

from checkpoint import (
    Catalog,
    Conflict,
    Failed,
    LatestN,
    LocalHost,
    NoCheckpoint,
    Outcome,
    Saver,
    StoreUnavailable,
    Unsupported,
    load,
    prune,
    set_aside,
    verify,
)
from checkpoint.format.codec import checksum
from checkpoint.format.keys import DAMAGED, damaged_key, manifest_key
from checkpoint.format.sealed import seal, unseal
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps, same_bits, save_alone, small_state
from tests.wrapped_stores import Faulty, Lost

NOW_S, GRACE_S = 10_000.0, 600.0


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    store = MemoryStore("aside", clock=clock)
    for step in (1, 2):
        save(store, step)
    return store


def save(store: MemoryStore, step: int, generation: int = 0) -> tuple[Outcome, ...]:
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        outcomes = save_alone(saver, step, generation)
        saver.close()
    return outcomes


def damage_pack(store: MemoryStore, step: int) -> None:
    key = Catalog(store).manifest(step).packs[0].key
    store.put(key, bytes(len(store.read(key)[0])))


def edit_manifest(store: MemoryStore, step: int) -> None:
    key = manifest_key(step)
    store.put(key, bytes(store.read(key)[0]).replace(b'"run"', b'"nur"'))


def cut_manifest(store: MemoryStore, step: int) -> None:
    store.put(manifest_key(step), bytes(store.read(manifest_key(step))[0])[:-9])


def age_manifest(store: MemoryStore, step: int) -> None:
    key = manifest_key(step)
    store.put(key, seal("manifest", unseal("manifest", store.read(key)[0], key), 9))


def set_all_aside(store: MemoryStore) -> None:
    for one in load(store).report.fallbacks:
        assert set_aside(store, one.step, one.why)


@pytest.mark.parametrize("generation", [0, 1], ids=["same generation", "next generation"])
@pytest.mark.parametrize("damage", [damage_pack, edit_manifest, cut_manifest])
def test_a_step_whose_checkpoint_was_damaged_and_set_aside_is_saved_anew_and_sound(store, damage, generation):
    damage(store, 2)
    set_all_aside(store)
    assert Catalog(store).steps() == [1]
    assert durable_steps(save(store, 2, generation)) == [2]
    assert verify(store).is_sound
    assert same_bits(load(store).state, small_state(2)) and load(store).report.fallbacks == ()


@pytest.mark.parametrize("damage", [edit_manifest, cut_manifest, age_manifest])
def test_a_manifest_that_cannot_be_read_fails_its_step_with_its_name_and_the_remedy(store, damage):
    damage(store, 2)
    for generation in (0, 1):
        (outcome,) = save(store, 2, generation)
        assert isinstance(outcome, Failed)
        assert all(said in outcome.why for said in (manifest_key(2), "holdfast verify", "resuming"))


def test_what_was_set_aside_is_kept_byte_for_byte_with_the_reason(store):
    cut_manifest(store, 2)
    data = bytes(store.read(manifest_key(2))[0])
    assert set_aside(store, 2, "it was cut")
    copy = damaged_key(2, checksum(data).hex())
    assert copy.startswith("control/damaged/000000000002-")
    assert [entry.key for entry in store.list(DAMAGED)] == [copy, f"{copy}.json"]
    assert bytes(store.read(copy)[0]) == data
    assert json.loads(bytes(store.read(f"{copy}.json")[0])) == {
        "policy": "damaged",
        "step": 2,
        "why": "it was cut",
    }


def test_there_is_nothing_to_set_aside_where_there_is_no_manifest(store):
    assert not set_aside(store, 7, "why not")
    assert set_aside(store, 2, "once") and not set_aside(store, 2, "twice")
    assert len(store.list(DAMAGED)) == 2


def test_a_restored_checkpoint_that_is_damaged_in_the_same_way_is_set_aside_again(store):
    data = bytes(store.read(manifest_key(2))[0])
    for _ in range(2):
        assert set_aside(store, 2, "its pack is gone")
        store.put_new(manifest_key(2), data)
    assert Catalog(store).latest() == 2 and verify(store).is_sound


@pytest.mark.parametrize("verb", ["put_new", "delete"])
@pytest.mark.parametrize("nth", [1, 2])
def test_setting_aside_can_break_off_anywhere_and_be_finished(store, verb, nth):
    damage_pack(store, 2)
    with pytest.raises(StoreUnavailable):
        set_aside(Faulty(store, [Lost(verb, nth)]), 2, "damaged")
    assert Catalog(store).steps() == [1, 2]
    set_all_aside(store)
    assert durable_steps(save(store, 2)) == [2]
    assert verify(store).is_sound


def test_a_copy_that_holds_something_else_keeps_the_manifest_where_it_is(store):
    data = bytes(store.read(manifest_key(2))[0])
    store.put(damaged_key(2, checksum(data).hex()), b"something else")
    with pytest.raises(Conflict, match="control/damaged"):
        set_aside(store, 2, "damaged")
    assert Catalog(store).steps() == [1, 2]


def test_the_packs_of_what_was_set_aside_are_orphans_from_then_on_and_go_after_the_grace(store, clock):
    older, packs = ({pack.key for pack in Catalog(store).manifest(step).packs} for step in (1, 2))
    clock.now_s += 100 * GRACE_S
    set_aside(store, 2, "damaged")
    assert prune(store, [LatestN(5)], now_s=clock.now_s + GRACE_S, grace_s=GRACE_S).removed == ()
    removed = prune(store, [LatestN(5)], now_s=clock.now_s + GRACE_S + 1, grace_s=GRACE_S).removed
    assert {one.key for one in removed} & {*packs, *older} == packs - older
    assert all("has needed it for 600 s" in one.why for one in removed)
    assert len(store.list(DAMAGED)) == 2 and verify(store).is_sound


def test_a_newest_checkpoint_of_a_later_release_is_not_passed_over(store):
    age_manifest(store, 2)
    with pytest.raises(Unsupported, match="upgrade"):
        load(store)


@pytest.mark.parametrize("damage", [edit_manifest, cut_manifest])
def test_the_latest_is_the_newest_that_can_be_read_as_load_finds_it(store, damage):
    damage(store, 2)
    assert Catalog(store).latest() == 1 == load(store).manifest.step
    damage(store, 1)
    assert Catalog(store).latest() is None


@pytest.mark.parametrize("damage", [damage_pack, cut_manifest])
def test_when_no_checkpoint_is_whole_the_error_names_the_steps_and_the_ways_out(store, damage):
    for step in range(3, 10):
        save(store, step)
    for step in range(1, 10):
        damage(store, step)
    with pytest.raises(NoCheckpoint) as told:
        load(store)
    for step in range(1, 10):
        assert str(step) in str(told.value)
    assert "Run `holdfast verify`, restore the store from a backup, or start a new run" in str(told.value)
