"""Flips, cuts and swaps all over a checkpoint's objects: refused each time, and the older one loaded."""

import pytest

from checkpoint import Catalog, CheckpointError, LocalHost, Saver, load, verify
from checkpoint.format.keys import manifest_key
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, same_bits, save_alone, small_state

NUM_PLACES = 48


@pytest.fixture
def store():
    store = MemoryStore("sweep")
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        for step in (1, 2):
            save_alone(saver, step)
        saver.close()
    return store


def objects_of(store: MemoryStore, step: int) -> dict[str, str]:
    manifest = Catalog(store).manifest(step)
    return {"manifest": manifest_key(step), "page": manifest.pages[0].key, "pack": manifest.packs[0].key}


def flip(store: MemoryStore, key: str, good: bytes, place: int) -> None:
    bad = bytearray(good)
    bad[place] ^= 1 << place % 8
    store.put(key, bad)


def assert_refused(store: MemoryStore) -> None:
    """The damaged checkpoint is refused when asked for, else passed over for the older one, loudly."""
    with pytest.raises(CheckpointError):
        load(store, 2)
    loaded = load(store)
    assert loaded.manifest.step == 1 and same_bits(loaded.state, small_state(1))
    assert [fallback.step for fallback in loaded.report.fallbacks] == [2]


@pytest.mark.parametrize("kind", ["manifest", "page"])
def test_a_flipped_bit_anywhere_in_the_metadata_is_refused(store, kind):
    key = objects_of(store, 2)[kind]
    good = bytes(store.read(key)[0])
    for place in range(0, len(good), max(1, len(good) // NUM_PLACES)):
        flip(store, key, good, place)
        assert_refused(store)


def test_a_flipped_bit_anywhere_in_a_pack_is_refused_or_hit_nothing_that_is_loaded(store):
    key = objects_of(store, 2)["pack"]
    good = bytes(store.read(key)[0])
    for place in range(0, len(good), len(good) // (2 * NUM_PLACES)):
        flip(store, key, good, place)
        try:
            loaded = load(store, 2)
        except CheckpointError:
            assert_refused(store)
        else:  # padding, or the pack's own index
            assert same_bits(loaded.state, small_state(2))


def test_a_flipped_bit_in_a_chunk_is_refused(store):
    key = objects_of(store, 2)["pack"]
    good = bytes(store.read(key)[0])
    for place in range(0, 64 * 33 * 4, 211):  # the first chunk is the weight, without padding
        flip(store, key, good, place)
        assert_refused(store)


@pytest.mark.parametrize("kind", ["manifest", "page", "pack"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.7])
def test_an_object_that_was_cut_short_is_refused(store, kind, kept):
    key = objects_of(store, 2)[kind]
    good = bytes(store.read(key)[0])
    store.put(key, good[: int(len(good) * kept)])
    assert_refused(store)


@pytest.mark.parametrize("kind", ["manifest", "page", "pack"])
def test_an_object_of_another_step_in_its_place_is_refused(store, kind):
    old, new = objects_of(store, 1)[kind], objects_of(store, 2)[kind]
    store.put(new, bytes(store.read(old)[0]))
    assert_refused(store)


@pytest.mark.parametrize("kind", ["page", "pack"])
def test_a_missing_object_is_refused(store, kind):
    store.delete(objects_of(store, 2)[kind])
    assert_refused(store)


def test_two_swapped_regions_of_a_pack_are_refused(store):
    key = objects_of(store, 2)["pack"]
    data = bytearray(store.read(key)[0])
    data[0:128], data[4096:4224] = data[4096:4224], data[0:128]
    store.put(key, data)
    assert_refused(store)
    assert verify(store, 2).num_bad > 0


def test_when_every_checkpoint_is_damaged_the_error_names_each_of_them(store):
    for step in (1, 2):
        store.put(objects_of(store, step)["pack"], b"")
    with pytest.raises(CheckpointError, match=r"step 2: .*step 1: "):
        load(store)
