"""Manifests, pages and packs come back as they were; damaged anywhere, they are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Corrupt, FormatError, Unsupported
from checkpoint.format.codec import Codec, decode, encode
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
from checkpoint.format.table import decode_table, encode_table
from checkpoint.store.memory import MemoryStore
from tests.format_samples import write_checkpoint

u64 = st.integers(0, 2**64 - 1)
boxes = st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), max_size=5).map(
    lambda pairs: Box(tuple(a for a, _ in pairs), tuple(n for _, n in pairs))
)
chunks = st.builds(
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


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    """One sample checkpoint, by kind of object."""
    store = MemoryStore()
    write_checkpoint(store, 3)
    return {entry.key.partition("/")[0]: bytes(store.read(entry.key)[0]) for entry in store.list("")}


@given(st.lists(chunks, max_size=20))
def test_a_page_gives_back_the_chunks_it_was_made_of(records):
    assert decode_page(encode_page(records)) == tuple(records)


@given(st.binary(max_size=400))
def test_a_table_of_any_bytes_is_refused_or_read_but_never_breaks(data):
    try:
        records = decode_table(memoryview(data), "here")
    except FormatError:
        return
    assert encode_table(records) == data


def test_a_manifest_gives_back_what_it_was_made_of(objects):
    manifest = decode_manifest(objects["manifests"], "manifests/000000000003")
    assert (manifest.run, manifest.step, manifest.version) == ("sample", 3, 0)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert encode_manifest(manifest) == objects["manifests"]


def test_a_manifest_begins_with_a_line_that_a_person_can_read(objects):
    assert objects["manifests"].startswith(b'{"holdfast": "manifest", "version": 0, "num_bytes": ')


@settings(max_examples=200)
@given(st.sampled_from(["manifests", "index"]), st.integers(0, 2**32), st.integers(1, 255))
def test_an_edit_of_any_byte_of_the_metadata_is_refused(objects, kind, place, difference):
    read = {"manifests": decode_manifest, "index": decode_page}[kind]
    data = bytearray(objects[kind])
    data[place % len(data)] ^= difference
    try:
        found = read(data, f"{kind}/x")
    except FormatError as error:
        refusal = str(error)
    else:  # only the head line has room for an edit that changes nothing, like a blank
        assert found == read(objects[kind])
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
    data = objects["manifests"].replace(b'"version": 0', b'"version": 1', 1)
    with pytest.raises(Unsupported, match=r"version 1.*upgrade holdfast"):
        decode_manifest(data, "manifests/x")


def test_a_page_is_held_against_its_manifest(objects):
    manifest = decode_manifest(objects["manifests"])
    (ref,) = manifest.pages
    records = chunks_of_page(manifest, ref, objects["index"])
    assert len(records) == ref.num_chunks == 5
    with pytest.raises(Corrupt, match="damaged"):
        chunks_of_page(manifest, ref, encode_page(records[1:]))
    assert not _refusal(manifest, records[0])
    box = records[0].box
    wrong: dict[str, dict[str, Any]] = {
        "number 9 of 4": {"tensor": 9},
        "pack number 1 of 1": {"pack": 1},
        "beyond the end": {"offset": 10**9},
        "does not lie within": {"box": Box((23, 0), (2, 16))},
        "does not lie within ": {"box": Box((0,), (1,))},
        "does not lie within  ": {"box": Box((0, 0), (0, 16))},
        "cannot store": {"num_bytes": 10**6},
        "cannot store ": {"codec": Codec.RAW, "num_bytes": box.numel * 4 - 1},
    }
    for why, change in wrong.items():
        assert why.strip() in _refusal(manifest, dataclasses.replace(records[0], **change))


def _refusal(manifest: Manifest, chunk: ChunkRecord) -> str:
    from checkpoint.format.manifest import page_ref

    data = encode_page([chunk])
    try:
        chunks_of_page(manifest, page_ref("index/x", data, 1), data)
    except Corrupt as error:
        return str(error)
    return ""


HOSTILE_FIELDS = [
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
    with pytest.raises(Corrupt, match="does not end as a pack"):
        index_range(pack[-TRAILER_BYTES - 1 : -1], len(pack) - 1, "packs/x")
    with pytest.raises(Corrupt, match="packs/x"):
        decode_pack_index(pack[offset + 1 : offset + length], len(pack), "packs/x")


def test_an_empty_pack_is_a_pack():
    pack = PackBuilder(0, "h0", 0).seal([])
    offset, length = index_range(pack[-TRAILER_BYTES:], len(pack), "packs/x")
    assert decode_pack_index(memoryview(pack)[offset : offset + length], len(pack)).chunks == ()


@given(st.sampled_from(Codec), st.binary(max_size=2000), st.integers(-3, 9))
def test_a_codec_gives_back_what_it_was_given(codec, data, level):
    stored = encode(codec, data, level)
    for kind in (bytes, bytearray, memoryview):
        assert bytes(decode(codec, kind(stored), len(data))) == data


@given(st.sampled_from(Codec), st.binary(max_size=200), st.integers(0, 400))
def test_content_of_another_length_is_corrupt(codec, data, length):
    stored = bytes(encode(codec, data))
    if length != len(data):
        with pytest.raises(Corrupt):
            decode(codec, stored, length)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_bytes_that_are_no_zstd_frame_are_corrupt(data, length):
    with pytest.raises(Corrupt):
        decode(Codec.ZSTD, b"x" + data, length)


def test_a_bomb_is_refused_before_it_goes_off():
    import tracemalloc

    bomb = bytes(encode(Codec.ZSTD, bytes(256 << 20)))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(Corrupt, match="268435456"):
        decode(Codec.ZSTD, bomb, 4 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_frame_that_hides_its_length_or_has_company_is_corrupt():
    import zstandard

    raw = np.arange(1000, dtype=np.uint8).tobytes()
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    with pytest.raises(Corrupt):
        decode(Codec.ZSTD, hidden, len(raw))
    with pytest.raises(Corrupt):
        decode(Codec.ZSTD, bytes(encode(Codec.ZSTD, raw)) + b"more", len(raw))
