"""Metadata with sound checksums that says what cannot be: a clear error, and memory stays bounded."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    chunks_of_page,
    decode_manifest,
    decode_page,
    encode_manifest,
    page_ref,
)
from checkpoint.format.pack import TRAILER_BYTES, decode_pack_index, index_range
from checkpoint.format.sealed import seal, unseal
from checkpoint.format.table import ROW, ChunkTable, encode_table
from checkpoint.format.tree import unflatten
from checkpoint.store.memory import MemoryStore
from tests.format_samples import write_checkpoint
from tests.golden_samples import write_golden

Read = Callable[[bytes], Any]


def golden() -> tuple[Manifest, bytes, bytes]:
    """Return a manifest, its page, and the index of its newest pack."""
    store = MemoryStore()
    write_golden(store)
    found = decode_manifest(store.read("manifests/000000000006")[0])
    pack = bytes(store.read(found.packs[-1].key)[0])
    offset, length = index_range(pack[-TRAILER_BYTES:], len(pack), "")
    return found, bytes(store.read(found.pages[0].key)[0]), pack[offset : offset + length]


MANIFEST, PAGE, INDEX = golden()


def refusal(act: Callable[[], object]) -> str:
    """Return why something was refused; nothing if it was not. Anything but a FormatError is a failure."""
    try:
        act()
    except FormatError as error:
        return str(error)
    return ""


def read_page(data: bytes) -> list[ChunkRecord]:
    ref = page_ref("index/x", data, len(decode_page(data, "index/x")))
    return list(chunks_of_page(replace(MANIFEST, pages=(ref,)), ref, data))


KINDS: dict[str, tuple[bytes, Read]] = {
    "manifest": (encode_manifest(MANIFEST), lambda data: decode_manifest(data, "manifests/x")),
    "page": (PAGE, read_page),
    "pack": (INDEX, lambda data: list(decode_pack_index(data, 10_000, "packs/x").chunks)),
}


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4),
    st.sampled_from([None, None, -1, -8, -56, 20, 100]),
)
def test_edited_metadata_under_a_new_checksum_is_refused_or_read_but_never_breaks(kind, edits, cut):
    sound, read = KINDS[kind]
    body = bytearray(unseal(kind, sound, ""))[:cut]
    for place, value in edits:
        body[place % len(body)] = value
    assert "/x" in (refusal(lambda: read(seal(kind, bytes(body)))) or "/x")


NASTY: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**63, 2**64, 2**70, -(2**70), 0.5, 1e308, -0.0, "", "x" * 5000, "../x"),
    *("\ud800", "\0", "float32", [], {}, [[]], [{}], {"$": "tensor"}, {"$": "int", "hex": "zz"}, [None] * 40),
]


DEEP = {"deep list": "[" * 900 + "]" * 900, "deep object": '{"a":' * 900 + "1" + "}" * 900}


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all values in a JSON document."""
    found = [path]
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        found += places(value, (*path, name))
    return found


@pytest.mark.parametrize("value", [*NASTY, *DEEP], ids=lambda value: repr(value)[:20])
def test_any_value_of_a_manifest_may_be_anything(value):
    body = bytes(unseal("manifest", KINDS["manifest"][0], ""))
    for path in places(json.loads(body)):
        document = [json.loads(body)]
        node: Any = document
        for name in (0, *path[:-1]):
            node = node[name]
        node[path[-1] if path else 0] = "HERE" if str(value) in DEEP else value
        text = json.dumps(document[0])
        text = text.replace('"HERE"', DEEP.get(str(value), ""))
        why = refusal(partial(whole_state, seal("manifest", text.encode())))
        assert why.isascii()
        assert len(why) < 1000


def whole_state(data: bytes) -> None:
    found = decode_manifest(data, "manifests/x")
    unflatten(found.skeleton, {tensor.name: tensor for tensor in found.tensors})


EXTREMES = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@settings(max_examples=300)
@given(
    st.sampled_from([name for name in ROW.names or () if name not in ("checksum", "reserved")]),
    st.integers(0, 100),
    st.sampled_from(EXTREMES),
)
def test_any_number_of_a_page_may_be_anything(field, row, value):
    table = decode_page(PAGE)
    rows = table.rows.copy()
    rows[field][row % len(rows)] = value % 2 ** (8 * rows[field].dtype.itemsize)
    counts = np.array([len(table), len(rows) - len(table)], "<u8")
    check_refused_or_sound(counts.tobytes() + rows.tobytes() + table.dims.tobytes())


@given(st.integers(0, 100), st.sampled_from(EXTREMES[:6]), st.integers(0, 100), st.sampled_from(EXTREMES[:6]))
def test_any_box_of_a_page_may_be_anything(place, value, other_place, other):
    table = decode_page(PAGE)
    dims = table.dims.copy()
    dims[place % len(dims)] = value
    dims[other_place % len(dims)] = other
    check_refused_or_sound(encode_table(ChunkTable(table.rows, dims, len(table))))


def check_refused_or_sound(body: bytes) -> None:
    """What is read at all lies within its tensor and its pack."""
    page = seal("page", body)
    if why := refusal(lambda: read_page(page)):
        assert "index/x" in why
        return
    for chunk in read_page(page):
        tensor, pack = MANIFEST.tensors[chunk.tensor], MANIFEST.packs[chunk.pack]
        assert all(b <= n for b, n in zip(chunk.box.stop, tensor.shape, strict=True))
        assert chunk.offset + chunk.num_bytes <= pack.num_bytes


def traced_peak(act: Callable[[], object], why: str) -> int:
    tracemalloc.start()
    with pytest.raises(Corrupt, match=why):
        act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


GROWING = [
    "[" + "[]," * 4_200_000 + "1]",
    '{"a":' * 4_200_000,
    "[" * 4_200_000,
    "[" + "1," * 17_000_000 + "1]",
]


@pytest.mark.parametrize("text", GROWING, ids=["lists", "deep objects", "deep lists", "numbers"])
def test_json_that_would_grow_many_times_is_refused_before_it_is_read(text: str):
    data = seal("manifest", text.encode())
    assert traced_peak(lambda: decode_manifest(data, "manifests/x"), "more values") < 2 * len(data)


def test_metadata_that_is_larger_than_any_is_refused_without_a_look():
    data = bytes(257 << 20)
    assert traced_peak(lambda: decode_manifest(data, "manifests/x"), "larger than any manifest") < 1 << 20
    assert traced_peak(lambda: decode_page(data, "index/x"), "larger than any page") < 1 << 20


HEADS = [
    (b'"num_bytes": ', b'"num_bytes": -', "num_bytes"),
    (b'"num_bytes": ', b'"num_bytes": 9', "instead of"),
    (b'"num_bytes": ', b'"num_bytes": 99999999999999999999', "num_bytes"),
    (b'"num_bytes": ', b'"more": 1, "num_bytes": ', "unknown fields"),
    (b'"version": 1', b'"version": true', "does not begin as a manifest"),
    (b'"version": 1', b'"version": 1.0', "does not begin as a manifest"),
    (b'"version": 1', b'"version": "1"', "does not begin as a manifest"),
    (b'"version": 1', b'"version": -1', "version -1"),
    (b'"manifest"', b'"page"', "does not begin as a manifest"),
    (b'{"holdfast"', b'{"x": ' + b"[" * 100 + b"]" * 100 + b', "holdfast"', "does not begin as a manifest"),
    (b'"xxh3_128": "', b'"xxh3_128": "0', "xxh3_128"),
    (b"{", b" " * 256 + b"{", "does not begin as a manifest"),
]


@pytest.mark.parametrize(("old", "new", "why"), HEADS)
def test_a_head_that_means_nothing_is_refused(old: bytes, new: bytes, why: str):
    data = KINDS["manifest"][0].replace(old, new, 1)
    with pytest.raises(FormatError, match=why):
        decode_manifest(data, "manifests/x")


def test_a_pack_that_ends_in_lies_is_refused():
    store = MemoryStore()
    found = write_checkpoint(store, 1)
    pack = bytes(store.read(found.packs[0].key)[0])
    for offset, length in ((2**64 - 1, 33), (2**63, 2**63), (0, len(pack)), (len(pack), 0)):
        trailer = offset.to_bytes(8, "little") + length.to_bytes(8, "little") + pack[-16:]
        with pytest.raises(Corrupt, match="does not end as a pack"):
            index_range(trailer, len(pack), "packs/x")
