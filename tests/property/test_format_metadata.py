"""Manifests, pages and packs come back as they were; damaged anywhere, they are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Corrupt, FormatError, Unsupported
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    chunks_of_page,
    decode_manifest,
    decode_page,
    encode_manifest,
    encode_page,
)
from checkpoint.format.pack import TRAILER_BYTES, PackBuilder, PackedTensor, decode_pack_index, index_range
from checkpoint.format.sealed import seal, unseal
from checkpoint.format.table import ChunkTable, decode_table, encode_table
from checkpoint.store.memory import MemoryStore
from tests.format_samples import write_checkpoint

u64 = st.integers(0, 2**64 - 1)
boxes = st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), max_size=5).map(
    lambda pairs: Box(tuple(a for a, _ in pairs), tuple(n for _, n in pairs))
)
alone = st.builds(
    ChunkRecord,
    tensor=st.integers(0, 2**32 - 1),
    box=boxes,
    codec=st.sampled_from(Codec),
    pack=st.integers(0, 2**32 - 1),
    offset=u64,
    num_bytes=st.integers(0, 2**32 - 1),
    checksum=st.binary(min_size=16, max_size=16),
    fingerprint=u64,
)


def _stacked(records: list[ChunkRecord]) -> ChunkRecord:
    """Make each record a delta against the next one, of the place that the first one has."""
    first, *_ = records
    below: ChunkRecord | None = None
    for record in reversed(records):
        below = dataclasses.replace(record, tensor=first.tensor, box=first.box, base=below)
    assert below is not None
    return below


chunks = st.lists(alone, min_size=1, max_size=4).map(_stacked)


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    """One sample checkpoint, by kind of object."""
    store = MemoryStore()
    write_checkpoint(store, 3)
    return {entry.key.partition("/")[0]: bytes(store.read(entry.key)[0]) for entry in store.list("")}


@given(st.lists(chunks, max_size=20))
def test_a_page_gives_back_the_chunks_it_was_made_of(records):
    assert tuple(decode_page(encode_page(records))) == tuple(sorted(records, key=lambda one: one.tensor))


@given(st.binary(max_size=400))
def test_a_table_of_any_bytes_is_refused_or_read_but_never_breaks(data):
    try:
        records = decode_table(memoryview(data), "here")
    except FormatError:
        return
    assert list(decode_table(memoryview(encode_table(records)), "here")) == list(records)


def test_a_manifest_gives_back_what_it_was_made_of(objects):
    manifest = decode_manifest(objects["manifests"], "manifests/000000000003")
    assert (manifest.run, manifest.step, manifest.version) == ("sample", 3, 1)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert encode_manifest(manifest) == objects["manifests"]


def test_a_manifest_begins_with_a_line_that_a_person_can_read(objects):
    assert objects["manifests"].startswith(b'{"holdfast": "manifest", "version": 1, "num_bytes": ')


def _plain(found: Manifest | ChunkTable) -> object:
    return list(found) if isinstance(found, ChunkTable) else found


@settings(max_examples=200)
@given(st.sampled_from(["manifests", "index"]), st.integers(0, 2**32), st.integers(1, 255))
def test_an_edit_of_any_byte_of_the_metadata_is_refused(objects, kind, place, difference):
    read: Any = {"manifests": decode_manifest, "index": decode_page}[kind]
    data = bytearray(objects[kind])
    data[place % len(data)] ^= difference
    try:
        found = read(data, f"{kind}/x")
    except FormatError as error:
        refusal = str(error)
    else:  # only the head line has room for an edit that changes nothing, like a blank
        assert _plain(found) == _plain(read(objects[kind]))
        return
    assert f"{kind}/x" in refusal


@given(st.sampled_from(["manifests", "index"]), st.integers(0, 2**32))
def test_truncated_metadata_is_refused(objects, kind, length):
    read = {"manifests": decode_manifest, "index": decode_page}[kind]
    with pytest.raises(Corrupt, match=f"{kind}/x"):
        read(objects[kind][: length % len(objects[kind])], f"{kind}/x")
    with pytest.raises(Corrupt, match="bytes instead of"):
        read(objects[kind] + b"\0", f"{kind}/x")


@given(st.binary(max_size=300))
def test_foreign_bytes_are_no_metadata(data):
    for read in (decode_manifest, decode_page):
        with pytest.raises(Corrupt):
            read(data)


def test_a_later_version_asks_for_an_upgrade(objects):
    body = unseal("manifest", objects["manifests"], "manifests/x")
    with pytest.raises(Unsupported, match=r"version 2.*upgrade holdfast"):
        decode_manifest(seal("manifest", body, 2), "manifests/x")


@pytest.mark.parametrize("digit", b"023456789")
def test_a_damaged_version_is_damage_and_no_later_release(objects, digit):
    data = objects["manifests"].replace(b'"version": 1', b'"version": %c' % digit, 1)
    with pytest.raises(Corrupt, match="manifests/x"):
        decode_manifest(data, "manifests/x")


def test_a_page_is_held_against_its_manifest(objects):
    manifest = decode_manifest(objects["manifests"])
    (ref,) = manifest.pages
    records = chunks_of_page(manifest, ref, objects["index"])
    assert len(records) == ref.num_chunks == 5
    with pytest.raises(Corrupt, match="damaged"):
        chunks_of_page(manifest, ref, encode_page(records[1:]))
    assert not _refusal(manifest, records[0])
    fits = manifest.packs[0].num_bytes - records[0].num_bytes
    assert not _refusal(manifest, dataclasses.replace(records[0], offset=fits))
    box = records[0].box
    wrong: dict[str, dict[str, Any]] = {
        "number 9 of 4": {"tensor": 9},
        "pack number 1 of 1": {"pack": 1},
        "beyond the end": {"offset": 10**9},
        "beyond the end ": {"offset": fits + 1},
        "beyond the end  ": {"offset": 2**64 - 1},
        "does not lie within": {"box": Box((23, 0), (2, 16))},
        "does not lie within ": {"box": Box((0,), (1,))},
        "does not lie within  ": {"box": Box((0, 0), (0, 16))},
        "cannot store": {"num_bytes": 10**6},
        "cannot store ": {"codec": Codec.RAW, "num_bytes": box.numel * 4 - 1},
    }
    for why, change in wrong.items():
        assert why.strip() in _refusal(manifest, dataclasses.replace(records[0], **change))


def test_a_chunk_of_more_than_four_mebibytes_is_refused():
    manifest = write_checkpoint(MemoryStore(), 1, {"x": ("uint8", np.zeros((4 << 20) + 1, np.uint8))})
    tensor, pack = manifest.tensors[0], dataclasses.replace(manifest.packs[0], num_bytes=8 << 20)
    manifest = dataclasses.replace(manifest, packs=(pack,))
    chunk = ChunkRecord(0, Box((0,), tensor.shape), Codec.RAW, 0, 0, (4 << 20) + 1, bytes(16), 0)
    assert "cannot store 4194305 bytes" in _refusal(manifest, chunk)
    assert not _refusal(manifest, dataclasses.replace(chunk, box=Box((1,), (4 << 20,)), num_bytes=4 << 20))


def test_a_page_lists_chunks_of_the_tensors_that_its_manifest_says(objects):
    manifest = decode_manifest(objects["manifests"])
    (ref,) = manifest.pages
    assert (ref.first_tensor, ref.last_tensor) == (0, 2)
    for first, last in ((0, 3), (1, 2), (0, 1)):
        wrong = dataclasses.replace(ref, first_tensor=first, last_tensor=last)
        with pytest.raises(Corrupt, match="instead of"):
            chunks_of_page(manifest, wrong, objects["index"])


def _refusal(manifest: Manifest, chunk: ChunkRecord) -> str:
    from checkpoint.format.manifest import page_ref

    data = encode_page([chunk])
    try:
        chunks_of_page(manifest, page_ref("index/x", data, 1), data)
    except Corrupt as error:
        return str(error)
    return ""


HOSTILE_FIELDS = [
    ('"num_chunks":5,"first_tensor":0', '"num_chunks":5,"first_tensor":3', "tensors that there are not"),
    ('"last_tensor":2', '"last_tensor":4', "tensors that there are not"),
    ('"last_tensor":2', '"last_tensor":-1', "last_tensor"),
    ('"metrics":{', '"metrics":[{', "JSON"),
    ('"loss":0.5', '"loss":"0.5"', "'loss'"),
    ('"loss":0.5', '"loss":true', "'loss'"),
    ('"loss":0.5', '"loss":[[]]', "'loss'"),
    ('"loss":0.5', '"loss":1' + "0" * 400, "no number"),
    ('"step":3', '"step":' + "[" * 300 + "]" * 300, "cannot be a list"),
    ('"key":"packs/000001-h0-000003"', '"key":' + "[" * 300 + "]" * 300, "no store can hold: a list"),
    ('"name":"model/bias","dtype"', '"name":"model/\\ud800","dtype"', "'name'"),
    ('"step":3', '"step":-3', "'step'"),
    ('"step":3', '"step":true', "'step'"),
    ('"step":3', '"step":1e3', "'step'"),
    ('"step":3', '"step":3,"extra":1', "unknown fields"),
    ('"run":"sample",', "", "lacks the field 'run'"),
    ('"packs/000001', '"../../etc/000001', "no store can hold"),
    ('"packs/000001', '"/packs/000001', "no store can hold"),
    ('"dtype":"float32"', '"dtype":"object"', "unknown dtype"),
    ('"shape":[24,16]', '"shape":[24,1152921504606846976]', "shape"),
    ('"shape":[24,16]', '"shape":[-1,16]', "shape"),
    ('"shape":[24,16]', '"shape":[24,true]', "shape"),
    ('"shape":[0,3]', '"shape":[0,99999999999999999999]', "shape"),
    ('"name":"model/bias","dtype"', '"name":"model/weight","dtype"', "twice"),
    ('{"$":"tensor","name":"model/bias"}', '{"$":"tensor","name":"elsewhere"}', "elsewhere"),
    ('"num_chunks":5', '"num_chunks":65537', "num_chunks"),
    ('"meta":{', '"meta":[{', "JSON"),
    ('"note":"made by hand"', '"note":NaN', "NaN"),
    ('"note":"made by hand"', '"note":' + "[" * 100_000 + "]" * 100_000, "JSON"),
]


@pytest.mark.parametrize(("old", "new", "why"), HOSTILE_FIELDS)
def test_a_manifest_with_a_sound_checksum_that_says_what_cannot_be_is_refused(objects, old, new, why):
    from checkpoint.format.sealed import seal, unseal

    body = bytes(unseal("manifest", objects["manifests"], "")).decode()
    assert body.count(old) >= 1
    with pytest.raises(Corrupt, match=why):
        decode_manifest(seal("manifest", body.replace(old, new, 1).encode()), "manifests/x")


def test_meta_that_is_not_json_is_refused_before_it_is_written(objects):
    manifest = decode_manifest(objects["manifests"])
    for meta in ({"x": float("nan")}, {"x": b"bytes"}, {"x": {1, 2}}):
        with pytest.raises(FormatError, match="not plain JSON"):
            encode_manifest(dataclasses.replace(manifest, meta=meta))


def test_a_pack_tells_what_is_in_it_without_its_manifest(objects):
    pack = objects["packs"]
    offset, length = index_range(pack[-TRAILER_BYTES:], len(pack), "packs/x")
    index = decode_pack_index(pack[offset : offset + length], len(pack), "packs/x")
    assert (index.generation, index.host, index.seq) == (1, "h0", 3)
    assert index.tensors[0] == PackedTensor("model/weight", "float32", (24, 16))
    assert all(chunk.offset % 64 == 0 for chunk in index.chunks)
    assert [dataclasses.replace(chunk, pack=0) for chunk in decode_page(objects["index"])] == list(
        index.chunks
    )
    last = index.chunks[-1]
    with pytest.raises(Corrupt, match="outside of it"):
        decode_pack_index(pack[offset : offset + length], last.offset + last.num_bytes - 1, "packs/x")
    with pytest.raises(Corrupt, match="does not end as a pack"):
        index_range(pack[-TRAILER_BYTES - 1 : -1], len(pack) - 1, "packs/x")
    with pytest.raises(Corrupt, match="packs/x"):
        decode_pack_index(pack[offset + 1 : offset + length], len(pack), "packs/x")


def test_an_empty_pack_is_a_pack():
    pack = PackBuilder(0, "h0", 0).seal([])
    offset, length = index_range(pack[-TRAILER_BYTES:], len(pack), "packs/x")
    assert len(decode_pack_index(memoryview(pack)[offset : offset + length], len(pack)).chunks) == 0
