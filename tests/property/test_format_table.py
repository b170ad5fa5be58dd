"""Tables are their records, however they are cut and joined; hostile ones are refused, in bounded memory."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.codec import Codec
from checkpoint.format.fingerprint import MODULUS
from checkpoint.format.layout import Box
from checkpoint.format.manifest import (
    MAX_CHUNKS_PER_PAGE,
    Manifest,
    PackRef,
    TensorRecord,
    chunks_of_page,
    decode_page,
    encode_pages,
    page_ref,
    pages_with,
)
from checkpoint.format.records import MAX_CHAIN, ChunkRecord
from checkpoint.format.sealed import seal
from checkpoint.format.table import NO_BASE, ROW, ChunkTable, decode_table, encode_table


def chunk(tensor: int, *, dims: int = 1, row: int = 0, base: ChunkRecord | None = None) -> ChunkRecord:
    box = Box((row,) + (0,) * (dims - 1), (1,) * dims) if dims else Box((), ())
    return ChunkRecord(tensor, box, Codec.RAW, row % 3, 64 * row, 4, bytes([row % 256] * 16), 97 * row, base)


@st.composite
def records(draw, most=12) -> list[ChunkRecord]:
    found = []
    for row in range(draw(st.integers(0, most))):
        tensor, dims = draw(st.integers(0, 5)), draw(st.integers(0, 3))
        below = None
        for level in range(draw(st.sampled_from([0, 0, 0, 1, 3, MAX_CHAIN]))):
            below = dataclasses.replace(chunk(tensor, dims=dims, row=row), base=below, pack=level)
        found.append(chunk(tensor, dims=dims, row=row, base=below))
    return found


@given(records())
def test_a_table_is_its_records(found):
    table = ChunkTable.of(found)
    assert len(table) == len(found)
    assert list(table) == found == [table[number] for number in range(len(found))]
    assert list(decode_table(memoryview(encode_table(table)), "here")) == found
    if found:
        assert table[-1] == found[-1]
    with pytest.raises(IndexError):
        table[len(found)]


@given(records(), st.integers(-3, 15), st.integers(-3, 15), st.sampled_from([1, 2, -1]))
def test_parts_of_a_table_are_those_of_its_records(found, first, last, step):
    table = ChunkTable.of(found)
    assert list(table[first:last:step]) == found[first:last:step]
    assert list(table.of_tensors({0, 3, 77})) == [one for one in found if one.tensor in (0, 3)]
    assert list(table.sorted_by_tensor()) == sorted(found, key=lambda one: one.tensor)
    for tensor, places in table.by_tensor().items():
        assert [found[place].tensor for place in places] == [tensor] * len(places)
    assert sorted(place for places in table.by_tensor().values() for place in places) == [*range(len(found))]


@given(records(), records(), st.integers(0, 12))
def test_tables_that_are_joined_hold_the_chunks_of_both(one, other, cut):
    tables = [ChunkTable.of(one), ChunkTable.of(other)[:cut], ChunkTable.of(other)[cut:]]
    joined = ChunkTable.concat(tables)
    assert list(joined) == one + other
    assert list(decode_table(memoryview(encode_table(joined)), "here")) == one + other
    assert len(ChunkTable.concat([])) == 0


@given(records())
def test_packs_are_renumbered_down_to_the_last_base(found):
    def moved(record: ChunkRecord) -> ChunkRecord:
        below = None if record.base is None else moved(record.base)
        return dataclasses.replace(record, pack=record.pack + 100, base=below)

    table = ChunkTable.of(found).with_packs(range(100, 200))
    assert list(table) == list(map(moved, found))


@given(records())
def test_fingerprints_are_summed_by_tensor(found):
    found = [dataclasses.replace(one, fingerprint=one.fingerprint * 2**57 % MODULUS) for one in found]
    expected: dict[int, int] = {}
    for one in found:
        expected[one.tensor] = (expected.get(one.tensor, 0) + one.fingerprint) % MODULUS
    assert ChunkTable.of(found).fingerprint_sums() == expected


def test_a_chain_is_bounded():
    below = chunk(0)
    for _ in range(MAX_CHAIN):
        below = dataclasses.replace(below, base=below)
    assert below.num_bases == MAX_CHAIN
    assert next(iter(ChunkTable.of([below]))) == below
    with pytest.raises(FormatError, match="more than 16 bases"):
        ChunkTable.of([dataclasses.replace(below, base=below)])
    with pytest.raises(FormatError, match="a base of another box"):
        ChunkTable.of([chunk(0, base=chunk(1))])
    with pytest.raises(FormatError, match="a base of another box"):
        ChunkTable.of([chunk(0, base=chunk(0, row=1))])


def raw_table(num_chunks: int, bases: list[int], **columns: list[int]) -> bytes:
    """Make the bytes of a table of 0-d chunks, the last rows of which are bases."""
    rows = np.zeros(len(bases), ROW)
    rows["base"] = bases
    for name, values in columns.items():
        rows[name] = values
    counts = np.array([num_chunks, len(bases) - num_chunks], "<u8")
    return counts.tobytes() + rows.tobytes()


LONG = [*range(1, MAX_CHAIN + 2), NO_BASE]
HOSTILE_BASES = {
    "itself": (1, [0, NO_BASE], {}),
    "a loop": (1, [1, 2, 1], {}),
    "a loop of bases": (1, [1, 1], {}),
    "a circle aside": (1, [NO_BASE, 2, 1], {}),
    "one above": (2, [NO_BASE, 0], {}),
    "a chunk": (2, [1, NO_BASE], {}),
    "the same twice": (2, [2, 2, NO_BASE], {}),
    "nobody's": (1, [NO_BASE, NO_BASE], {}),
    "beyond the end": (1, [7, NO_BASE], {}),
    "of another tensor": (1, [1, NO_BASE], {"tensor": [0, 1]}),
    "with a box": (1, [1, NO_BASE], {"num_dims": [0, 1]}),
    "too long": (1, LONG, {}),
}


@pytest.mark.parametrize("name", HOSTILE_BASES)
def test_bases_that_lead_nowhere_or_round_in_circles_are_refused(name: str):
    num_chunks, bases, columns = HOSTILE_BASES[name]
    data = raw_table(num_chunks, bases, **columns) + bytes(16 * sum(columns.get("num_dims", [])))
    with pytest.raises(Corrupt, match="here"):
        decode_table(memoryview(data), "here")


def test_the_longest_chain_that_may_be_is_read():
    data = raw_table(1, [*range(1, MAX_CHAIN + 1), NO_BASE])
    assert decode_table(memoryview(data), "here")[0].num_bases == MAX_CHAIN


@pytest.mark.parametrize("counts", [(2**63, 2**63), (2**64 - 1, 1), (65537, 0), (65536, 1), (10**6, 10**6)])
def test_counts_that_are_too_large_are_refused_before_anything_is_made(counts):
    data = np.array(counts, "<u8").tobytes() + bytes(2000)
    tracemalloc.start()
    with pytest.raises(Corrupt, match="does not hold the chunks that it counts"):
        decode_table(memoryview(data), "here")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "value"), [("codec", 3), ("codec", 255), ("num_dims", 33), ("num_dims", 1)]
)
def test_rows_that_mean_nothing_are_refused(field: str, value: int):
    with pytest.raises(Corrupt, match="here"):
        decode_table(memoryview(raw_table(1, [NO_BASE], **{field: [value]})), "here")


@pytest.mark.parametrize("num_chunks", [MAX_CHUNKS_PER_PAGE + 1, 1])
def test_more_rows_than_a_table_may_have_are_refused_though_they_are_there(num_chunks: int):
    num_rows = MAX_CHUNKS_PER_PAGE + 1
    data = raw_table(num_chunks, [NO_BASE] * num_chunks + [NO_BASE] * (num_rows - num_chunks))
    with pytest.raises(Corrupt, match="does not hold the chunks that it counts"):
        decode_table(memoryview(data), "here")
    with pytest.raises(FormatError, match="do not fit into one table"):
        encode_table([chunk(0)] * num_rows)


def test_something_in_the_reserved_bytes_is_refused():
    data = bytearray(raw_table(1, [NO_BASE]))
    data[-1] = 1
    with pytest.raises(Corrupt, match="reserved"):
        decode_table(memoryview(data), "here")


def test_a_page_out_of_order_is_refused():
    page = seal("page", encode_table([chunk(1), chunk(0)]))
    with pytest.raises(Corrupt, match="order of their tensors"):
        decode_page(page, "index/x")


def large_table(num_chunks: int, num_tensors: int) -> ChunkTable:
    """Make a table of 2-d chunks of 4 MiB each, dealt evenly to tensors."""
    each = num_chunks // num_tensors
    rows = np.zeros(num_chunks, ROW)
    places = np.arange(num_chunks)
    rows["tensor"], rows["num_dims"], rows["base"] = places // each, 2, NO_BASE
    rows["pack"], rows["offset"], rows["num_bytes"] = places // 16, places % 16 << 22, 4 << 20
    rows["fingerprint"] = places * 2**40
    dims = np.zeros((num_chunks, 2, 2), np.int64)
    dims[:, 0, 0], dims[:, 1] = places % each * 1024, 1024
    return ChunkTable(rows, dims.reshape(-1), num_chunks)


def test_an_index_of_200_000_chunks_opens_with_little_memory_and_only_where_it_is_needed():
    num_chunks, num_tensors = 200_000, 1000
    table = large_table(num_chunks, num_tensors)
    pages = list(encode_pages(table))
    assert [count for _, count in pages[:-1]] == [MAX_CHUNKS_PER_PAGE] * 3
    sums = table.fingerprint_sums()
    shape = (num_chunks // num_tensors * 1024, 1024)
    manifest = Manifest(
        run="large",
        step=1,
        generation=1,
        token="",
        created_utc="",
        spec_digest="",
        tensors=tuple(TensorRecord(f"t{n}", "float32", shape, sums[n]) for n in range(num_tensors)),
        packs=tuple(PackRef(f"packs/{n}", 16 << 22) for n in range(num_chunks // 16)),
        pages=tuple(page_ref(f"index/{n}", data, count) for n, (data, count) in enumerate(pages)),
        skeleton={},
        meta={},
    )
    (only,) = pages_with(manifest, {500})
    assert only.first_tensor <= 500 <= only.last_tensor
    assert len(pages_with(manifest, range(num_tensors))) == len(pages)
    assert pages_with(manifest, {num_tensors}) == pages_with(manifest, ()) == ()
    tracemalloc.start()
    opened = ChunkTable.concat(
        [chunks_of_page(manifest, ref, data) for ref, (data, _) in zip(manifest.pages, pages, strict=True)]
    )
    assert tracemalloc.get_traced_memory()[1] < 300 * num_chunks
    tracemalloc.stop()
    assert opened.fingerprint_sums() == sums
    starts, sizes = opened.boxes(opened.by_tensor()[999])
    assert (starts[:, 0] == np.arange(200) * 1024).all()
    assert (sizes == 1024).all()


def test_pages_are_cut_so_that_bases_fit_too():
    below = chunk(0)
    for _ in range(3):
        below = dataclasses.replace(below, base=below)
    found = [below] * (MAX_CHUNKS_PER_PAGE // 4 + 1)
    pages = list(encode_pages(found))
    assert [count for _, count in pages] == [MAX_CHUNKS_PER_PAGE // 4, 1]
    assert [decode_page(data)[0] for data, _ in pages] == [below, below]
