"""Flips, cuts and swaps all over a checkpoint's objects: refused each time, and the older one loaded."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint import Catalog, CheckpointError, LocalHost, Saver, Unsupported, load, verify
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key
from checkpoint.format.layout import Box, split_box
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, same_bits, save_alone, small_state
from tests.restore_samples import Bits, Manner, Written, random_bits, write_cut

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
    with pytest.raises(CheckpointError) as told:
        load(store, 2)
    assert not isinstance(told.value, Unsupported), "a flipped version is damage, and no later release"
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


HISTORIES = {
    "raw": lambda chance: Codec.RAW,
    "zstd": lambda chance: Codec.ZSTD,
    "planes": lambda chance: Codec.PLANES,
    "any codec": lambda chance: chance.choice(list(Codec)),
}


def evolve(chance: random.Random, tensors: dict[str, tuple[str, Bits]]) -> dict[str, tuple[str, Bits]]:
    """Change a few elements of some tensors; the others are frozen."""
    changed = dict(tensors)
    for name in ("half", "full"):
        bits = tensors[name][1].copy()
        for place in chance.sample(range(bits.size), 20):
            bits.reshape(-1)[place] ^= bits.dtype.type(1 << chance.randrange(10))
        changed[name] = tensors[name][0], bits
    return changed


def write_deltas(kind: str) -> tuple[MemoryStore, list[Written]]:
    """Write three checkpoints: frozen chunks are stored once, changed ones as deltas of the one before."""
    chance = random.Random(kind)
    codec, store = HISTORIES[kind], MemoryStore(kind)
    ramp = np.arange(3000)
    tensors: dict[str, tuple[str, Bits]] = {
        "half": ("bfloat16", (0x3F80 + ramp % 90).astype("<u2").reshape(50, 60)),
        "full": ("float32", (0x3F800000 + ramp % 700).astype("<u4").reshape(60, 50)),
        "frozen": ("float32", (0x3F800000 + ramp % 70).astype("<u4")),
        "flags": ("bool", random_bits(chance, "bool", (77,))),
        "step": ("int64", np.array(3, "<u8")),
    }
    history: list[Written] = []
    for step in (1, 2, 3):
        boxes = {name: split_box(Box.whole(bits.shape), 8, 4096) for name, (_, bits) in tensors.items()}
        earlier = history[-1] if history else None
        history.append(write_cut(store, step, tensors, boxes, Manner(lambda: codec(chance), 2, 4, earlier)))
        tensors = evolve(chance, tensors)
    return store, history


def is_state(state: Any, written: Written) -> bool:
    return all(
        state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == bits.tobytes()
        for name, (_, bits) in written.tensors.items()
    )


def damages(chance: random.Random, good: bytes, others: list[bytes]) -> list[bytes]:
    """Return an object damaged in many ways and places: flips, cuts, swaps, zeros, growth, another object."""
    size, bad = len(good), []
    for place in range(0, size, max(1, size // 16)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << chance.randrange(8)
        bad.append(bytes(flipped))
    bad += [good[:length] for length in (0, 1, size // 3, size // 2, size - 33, size - 1)]
    bad += [good + b"x", good[1:], good[::-1]]
    for _ in range(4):
        length = chance.choice([1, 8, 64, 256])
        one, other = chance.randrange(size), chance.randrange(size)
        swapped = bytearray(good)
        swapped[one : one + length], swapped[other : other + length] = (
            good[other : other + length],
            good[one : one + length],
        )
        bad.append(bytes(swapped[:size]))
        bad.append(good[:one] + bytes(min(length, size - one)) + good[one + length :])
    return [one for one in [*bad, *others] if one != good]


@pytest.mark.slow
@pytest.mark.parametrize("kind", HISTORIES)
def test_no_damage_to_any_object_of_a_chain_of_checkpoints_is_ever_loaded(kind):
    store, history = write_deltas(kind)
    newest = history[-1].manifest
    assert len(newest.packs) > 2, "the newest checkpoint stands on packs of older ones"
    keys = [manifest_key(3), *(page.key for page in newest.pages), *(pack.key for pack in newest.packs)]
    objects = {key: bytes(store.read(key)[0]) for key in keys}
    chance = random.Random(1)
    num_refused = 0
    for key, good in objects.items():
        for bad in damages(chance, good, [other for name, other in objects.items() if name != key][:3]):
            store.put(key, bad)
            try:
                assert is_state(load(store, 3).state, history[2])  # padding, a pack's own index
            except CheckpointError:
                num_refused += 1
            if chance.random() < 0.7:
                continue
            try:
                loaded = load(store)
            except CheckpointError:
                continue  # it shares what was damaged with all the older ones, or claims a newer version
            assert is_state(loaded.state, history[loaded.manifest.step - 1])
        store.put(key, good)
    assert num_refused > 100
    assert is_state(load(store).state, history[2])


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_flip_in_the_bytes_of_any_chunk_that_is_read_is_refused(kind):
    store, history = write_deltas(kind)
    chance = random.Random(2)
    for record, _ in history[-1].records.values():
        link = record
        while link is not None:
            key = history[-1].manifest.packs[link.pack].key
            good = bytes(store.read(key)[0])
            flip(store, key, good, link.offset + chance.randrange(link.num_bytes))
            try:
                assert is_state(load(store, 3).state, history[2])
                assert link.codec is not Codec.RAW  # a frame may hold a bit that means nothing
            except CheckpointError:
                pass
            store.put(key, good)
            link = link.base  # type: ignore[assignment]


def test_a_delta_whose_base_was_exchanged_for_a_sound_one_of_another_step_is_refused():
    store, history = write_deltas("raw")
    first, second = (history[step].manifest.packs for step in (0, 1))
    for one, other in zip(first, second, strict=False):
        store.put(one.key, bytes(store.read(other.key)[0]))
    with pytest.raises(CheckpointError):
        load(store, 3)
