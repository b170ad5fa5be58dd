"""The scrub reads the sums of blocks behind raw chunks, and names damaged ones as what no restore needs."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from checkpoint import LocalHost
from checkpoint.engine.catalog import Catalog
from checkpoint.format.blocks import SUM_BYTES, blocks_of
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box, split_box
from checkpoint.lifecycle.promotion import promote
from checkpoint.lifecycle.repair import repair
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_shares import give, handling
from tests.restore_samples import Manner, Written, random_bits, write_cut

SHAPE = (768, 256)  # 768 KiB in float32: three chunks of 256 KiB, of two blocks each
BOXES = split_box(Box.whole(SHAPE), 4, 256 << 10)
ODD = (200_001,)  # bytes: behind a chunk of so many are 63 zeros, and two sums would fit there


def write(store: MemoryStore, step: int, seed: int, manner: Manner | None = None) -> Written:
    bits = random_bits(random.Random(seed), "float32", SHAPE)
    return write_cut(store, step, {"w": ("float32", bits)}, {"w": BOXES}, manner)


def places(written: Written) -> list[tuple[str, int]]:
    """Return where the sums of each chunk begin: its pack, and how far into it."""
    return [(pack.key, record.offset + record.num_bytes) for record, pack in written.records.values()]


def put_over(store: MemoryStore, key: str, at: int, data: bytes) -> None:
    whole = bytearray(store.read(key)[0])
    whole[at : at + len(data)] = data
    store.put(key, whole)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("damage", [b"\x01", bytes(2 * SUM_BYTES), b"\xff" * SUM_BYTES])
def test_damaged_sums_are_named_and_their_checkpoint_is_whole(which: int, damage: bytes):
    store = MemoryStore("sums")
    written = write(store, 1, 1)
    key, at = places(written)[which]
    assert verify(store).spare == ()
    put_over(store, key, at, damage)
    report = verify(store)
    assert report.is_sound and report.bad == ()
    (spare,) = report.spare
    assert (spare.step, spare.key) == (1, key)
    assert spare.item.startswith("the sums of blocks of w (") and f"{at}+16 of {key}" in spare.item
    assert "no restore needs them" in spare.why and "repair" in spare.why


def test_sums_that_an_older_writer_did_not_write_are_no_finding_whatever_lies_in_their_place():
    store = MemoryStore("older")
    write(store, 1, 1, Manner(has_sums=False))  # two chunks and the index lie directly behind chunks
    bits = {name: ("uint8", random_bits(random.Random(2), "uint8", ODD)) for name in ("a", "b")}
    boxes: dict[str, Sequence[Box]] = {name: [Box.whole(ODD)] for name in bits}
    write_cut(store, 2, bits, boxes, Manner(has_sums=False))  # zeros of padding lie behind them
    report = verify(store)
    assert report.is_sound and report.spare == ()


@pytest.mark.parametrize("manner", [Manner(has_sums=False), Manner()])
def test_where_padding_might_lie_anything_but_zeros_and_sums_is_named(manner: Manner):
    store = MemoryStore("odd")
    assert (found := blocks_of("uint8", ODD, Box.whole(ODD))) is not None and found.sums_bytes <= 63
    bits = {name: ("uint8", random_bits(random.Random(3), "uint8", ODD)) for name in ("a", "b")}
    written = write_cut(store, 1, bits, {name: [Box.whole(ODD)] for name in bits}, manner)
    assert verify(store).spare == ()
    for key, at in places(written):
        put_over(store, key, at, b"\x07")
    report = verify(store)
    assert report.is_sound and len(report.spare) == 2


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.PLANES])
def test_what_a_host_saves_has_no_damaged_sums(codec: Codec):
    store = MemoryStore("saved")
    random = np.random.default_rng(7)
    rows = {f"t{n}": random.integers(0, 255, (128 << 10) + n * 4999, np.uint8) for n in range(30)}
    with LocalHost(store, arena_bytes=32 << 20) as host:
        assert give(host, 1, rows, handling(codec=codec))
        assert give(host, 2, {**rows, "t3": rows["t3"] + np.uint8(1)}, handling(codec=codec, delta_chain=3))
    report = verify(store)
    assert report.steps == (2, 1) and report.is_sound and report.spare == ()


def test_zeros_are_the_sums_of_zeros():
    store = MemoryStore("zeros")
    bits = random_bits(random.Random(1), "float32", SHAPE)
    bits[:] = 0
    write_cut(store, 1, {"w": ("float32", bits)}, {"w": BOXES}, Manner())
    assert verify(store).spare == ()


def test_damaged_sums_are_named_of_every_checkpoint_that_shares_their_chunk_and_below_a_delta():
    store = MemoryStore("shared")
    first = write(store, 1, 1)
    write(store, 2, 1, Manner(earlier=first))
    write(store, 3, 2, Manner(earlier=first))
    key, at = places(first)[0]
    put_over(store, key, at, b"\x01")
    report = verify(store)
    assert report.is_sound and [bad.step for bad in report.spare] == [3, 2, 1]
    assert {bad.key for bad in report.spare} == {key}


def test_a_chunk_of_which_the_checkpoint_does_not_know_is_not_taken_for_sums():
    store = MemoryStore("partly")
    bits = {name: ("float32", random_bits(random.Random(name), "float32", (256, 256))) for name in "ab"}
    boxes = {name: [Box.whole((256, 256))] for name in bits}
    first = write_cut(store, 1, bits, boxes, Manner(has_sums=False))
    write_cut(store, 2, {"a": bits["a"]}, boxes, Manner(earlier=first))
    assert Catalog(store).manifest(2).packs[-1] == first.manifest.packs[0]
    assert verify(store, 2).spare == ()


def test_damaged_sums_are_mended_from_a_store_that_has_them():
    near, far = MemoryStore("near"), MemoryStore("far")
    written = write(near, 1, 1)
    promote(near, far, 1)
    key, at = places(written)[1]
    good = bytes(near.read(key)[0])
    put_over(near, key, at, b"\x01\x02\x03")
    report = repair(near, 1, far)
    assert report.is_sound and report.mended == (key,) and report.after is not None
    assert report.after.spare == () and bytes(near.read(key)[0]) == good


def test_damaged_sums_that_the_other_store_has_damaged_as_well_are_named_after_the_repair():
    near, far = MemoryStore("near"), MemoryStore("far")
    written = write(near, 1, 1)
    promote(near, far, 1)
    key, at = places(written)[1]
    for store in (near, far):
        put_over(store, key, at, b"\x01\x02\x03")
    report = repair(near, 1, far)
    assert report.is_sound and report.after is not None
    assert [bad.key for bad in report.after.spare] == [key]


def test_a_damaged_chunk_is_bad_and_its_sums_are_not_spoken_of():
    store = MemoryStore("both")
    key, at = places(write(store, 1, 1))[0]
    put_over(store, key, at - 1, b"\x01\x01")
    report = verify(store)
    assert [bad.key for bad in report.bad] == [key] and report.spare == ()
