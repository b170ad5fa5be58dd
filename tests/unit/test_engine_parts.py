"""A restore that wants little of a chunk reads the blocks that hold it, and believes what it proved only."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.restore import restore_into
from checkpoint.engine.targets import Wanted
from checkpoint.errors import Corrupt
from checkpoint.format.blocks import blocks_of
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key
from checkpoint.format.layout import Box, split_box
from checkpoint.format.manifest import decode_page, encode_manifest, encode_page, page_ref
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from tests.restore_samples import Manner, Written, random_bits, write_cut

SHAPE = (6144, 128)  # 3 MiB in float32: two chunks of 12 blocks
ROW = 512
CHUNK = Box.whole(SHAPE)


@pytest.fixture(params=["direct", "plain"])
def store(request, tmp_path) -> Any:
    """A store that reads into the caller's memory, and one that does not."""
    return LocalStore(tmp_path) if request.param == "direct" else MemoryStore()


def write(store: Any, manner: Manner | None = None, chunk_bytes: int = 3 << 19) -> Written:
    bits = random_bits(random.Random(1), "float32", SHAPE)
    boxes = split_box(CHUNK, 4, chunk_bytes)
    return write_cut(store, 1, {"w": ("float32", bits)}, {"w": boxes}, manner)


def want(first: int, last: int, columns: int = 128) -> Wanted:
    size = (last - first, columns)
    return Wanted("w", "float32", SHAPE, Box((first, 0), size), torch.zeros(size))


def is_filled(written: Written, one: Wanted) -> bool:
    bits = written.tensors["w"][1][one.box.within(CHUNK)]
    assert isinstance(one.target, torch.Tensor)
    return bool((one.target.numpy().view(np.uint32) == bits).all())


def flip(store: Any, written: Written, place: int) -> None:
    """Flip a bit in the pack, so many bytes after the beginning of the first chunk."""
    record, pack = next(iter(written.records.values()))
    data = bytearray(store.read(pack.key)[0])
    data[record.offset + place] ^= 4
    store.put(pack.key, data)


def read_of(store: Any, *wanted: Wanted, policy: ReadPolicy | None = None) -> int:
    return restore_into(store, list(wanted), step=1, policy=policy or ReadPolicy()).report.num_bytes


def test_only_the_blocks_that_hold_what_is_wanted_are_read(store):
    written = write(store)
    blocks = blocks_of("float32", SHAPE, next(iter(written.records))[1])
    assert blocks is not None and (blocks.count, blocks.width) == (12, 256)
    one = want(300, 1500)
    assert read_of(store, one) == 5 * 256 * ROW + blocks.sums_bytes and is_filled(written, one)
    far = want(10, 11), want(1000, 1001)  # what lies between is read as well
    assert read_of(store, *far) == 4 * 256 * ROW + blocks.sums_bytes
    assert all(is_filled(written, each) for each in far)


@pytest.mark.parametrize("rows", [(0, 6144), (1, 6143), (3000, 3100), (100, 3073), (3071, 6000)])
@pytest.mark.parametrize("columns", [128, 127])
def test_whatever_rows_are_wanted_they_are_those_that_were_saved(store, rows, columns):
    written = write(store)
    one = want(rows[0], rows[1], columns)
    read_of(store, one)
    assert is_filled(written, one)


def test_a_flipped_bit_in_a_block_that_is_read_is_refused_and_one_elsewhere_does_not_matter(store):
    written = write(store)
    flip(store, written, 256 * ROW - 1)
    one = want(300, 400)
    read_of(store, one)
    assert is_filled(written, one)
    for rows in ((255, 256), (0, 1), (100, 900), (0, 6144)):
        with pytest.raises(Corrupt, match="'w'"):
            read_of(store, want(rows[0], rows[1]))


def test_sums_that_are_damaged_or_missing_cost_bytes_and_nothing_else(store):
    written = write(store)
    flip(store, written, 3072 * ROW + 8)
    one, whole = want(300, 400), want(0, 6144)
    assert read_of(store, one) > 3072 * ROW and is_filled(written, one)
    read_of(store, whole)
    assert is_filled(written, whole)


def test_sums_that_were_swapped_cost_bytes_and_nothing_else(store):
    written = write(store)
    record, pack = next(iter(written.records.values()))
    data, end = bytearray(store.read(pack.key)[0]), record.offset + record.num_bytes
    data[end : end + 16] = data[end + 8 : end + 16] + data[end : end + 8]
    store.put(pack.key, data)
    one = want(300, 400)
    report = restore_into(store, [one], step=1).report
    assert is_filled(written, one) and report.num_detours == 0


def test_a_checkpoint_without_sums_is_read_chunk_by_chunk(store):
    written = write(store, Manner(has_sums=False))
    one, whole = want(300, 400), want(0, 6144)
    assert read_of(store, one) >= 3072 * ROW and is_filled(written, one)
    read_of(store, whole)
    assert is_filled(written, whole)


def test_a_chunk_that_was_compressed_is_read_as_a_whole(store):
    written = write(store, Manner(codec=lambda: Codec.PLANES))
    one = want(300, 400)
    read_of(store, one)
    assert is_filled(written, one)


def rewrite_index(store: Any, written: Written, change: Callable[[list[Any]], list[Any]]) -> None:
    """Put other rows in the index, under a manifest that says it is to be so."""
    page = written.manifest.pages[0]
    changed = change(list(decode_page(store.read(page.key)[0])))
    data = encode_page(changed)
    store.put(page.key, data)
    manifest = replace(written.manifest, pages=(page_ref(page.key, data, len(changed)),))
    store.put(manifest_key(1), encode_manifest(manifest))


def swap_places(store: Any, written: Written) -> None:
    """Let the index say that two chunks of equal size lie in each other's place of the tensor."""

    def swapped(chunks: list[Any]) -> list[Any]:
        first, second, *others = chunks
        return [replace(first, box=second.box), replace(second, box=first.box), *others]

    rewrite_index(store, written, swapped)


@pytest.mark.parametrize("rows", [(0, 6144), (100, 300), (100, 5000)])
def test_chunks_whose_places_were_swapped_in_the_index_are_refused(store, rows):
    written = write(store)
    swap_places(store, written)
    with pytest.raises(Corrupt):
        read_of(store, want(rows[0], rows[1]))


def test_a_chunk_with_one_block_that_is_not_nothing_is_refused_in_another_place(store):
    bits = np.zeros(SHAPE, np.uint32)
    bits[700, 3] = 1
    written = write_cut(store, 1, {"w": ("float32", bits)}, {"w": split_box(CHUNK, 4, 3 << 19)})
    one = want(0, 6144)
    read_of(store, one)
    assert is_filled(written, one)
    swap_places(store, written)
    with pytest.raises(Corrupt):
        read_of(store, want(0, 6144))


def test_any_flipped_bit_of_a_chunk_that_goes_straight_to_its_place_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    written = write(store)
    for place in range(7, 3072 * ROW, 3072 * ROW // 23):
        flip(store, written, place)
        with pytest.raises(Corrupt, match="checksum"):
            read_of(store, want(0, 6144))
        flip(store, written, place)


def test_a_checksum_that_was_wrong_from_the_start_harms_no_raw_chunk_and_verify_finds_it(store):
    written = write(store)
    rewrite_index(store, written, lambda chunks: [replace(one, checksum=bytes(16)) for one in chunks])
    one = want(0, 6144)
    read_of(store, one)
    assert is_filled(written, one), "the fingerprint, made anew of every byte, proves it"
    bad = verify(store).bad
    assert len(bad) == len(written.records) and all("checksum" in each.why for each in bad)


def test_what_a_codec_made_is_held_against_its_checksum_as_well(store):
    bits = np.tile(np.arange(128, dtype=np.uint32), (6144, 1))
    written = write_cut(store, 1, {"w": ("float32", bits)}, {"w": [CHUNK]}, Manner(codec=lambda: Codec.ZSTD))
    rewrite_index(store, written, lambda chunks: [replace(one, checksum=bytes(16)) for one in chunks])
    with pytest.raises(Corrupt, match="checksum"):
        read_of(store, want(0, 6144))


class Lazy(LocalStore):
    """A store that leaves before it has filled everything."""

    def read_into(self, key: str, offset: int, pieces: Any) -> None:
        """Fill the first piece only."""
        super().read_into(key, offset, [next(iter(pieces))])


def test_what_a_store_did_not_fill_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.engine.straight.find_reader", lambda: None)  # which asks no store
    store = Lazy(tmp_path)
    written = write(store)
    one = want(0, 6144)
    read_of(store, one)
    assert is_filled(written, one), "it was read again, the plain way"
