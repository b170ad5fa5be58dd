"""Many chunk records at once, as columns: how pages and pack indices hold them, and readers use them."""

import struct
from collections.abc import Collection, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box
from checkpoint.format.records import MAX_CHAIN, MAX_CHUNKS_PER_PAGE, MAX_DIMS, ChunkRecord

ROW = np.dtype(
    {
        "names": [
            *("tensor", "pack", "offset", "fingerprint", "checksum", "num_bytes", "base", "codec"),
            *("num_dims", "reserved"),
        ],
        "formats": ["<u4", "<u4", "<u8", "<u8", "V16", "<u4", "<u4", "u1", "u1", "V6"],
        "offsets": [0, 4, 8, 16, 24, 40, 44, 48, 49, 50],
        "itemsize": 56,
    }
)
NO_BASE = 2**32 - 1
_COUNTS = struct.Struct("<QQ")
_DIM = np.dtype("<i8")
_BATCH = 4096  # records made at a time

Rows = NDArray[Any]
Places = NDArray[np.int64]


class ChunkTable(Sequence[ChunkRecord]):
    """Chunks as columns. It counts, iterates and indexes like a tuple of ChunkRecord; a slice is a table.

    `rows` holds the chunks, then the bases of those stored as deltas (see docs/format.md); `dims` the boxes
    of the chunks, one after the other: starts, then sizes.
    """

    __slots__ = ("_ends", "dims", "num_chunks", "rows")

    def __init__(self, rows: Rows, dims: Places, num_chunks: int) -> None:
        self.rows = rows
        self.dims = dims
        self.num_chunks = num_chunks
        self._ends = np.cumsum(2 * rows["num_dims"][:num_chunks].astype(np.int64))

    @classmethod
    def of(cls, chunks: Sequence[ChunkRecord]) -> "ChunkTable":
        """Return chunks as a table. Raises FormatError for a chain of bases that the format does not know."""
        if isinstance(chunks, ChunkTable):
            return chunks
        records = list(chunks)
        bases = _chain_up(records)
        dims = [n for chunk in chunks for n in (*chunk.box.start, *chunk.box.size)]
        return cls(_rows(records, bases), np.array(dims, _DIM), len(chunks))

    @classmethod
    def concat(cls, tables: Sequence["ChunkTable"]) -> "ChunkTable":
        """Return the chunks of all tables, one table after the other."""
        if len(tables) == 1:
            return tables[0]
        num_chunks = sum(map(len, tables))
        first_base = num_chunks
        chunks, bases = [np.zeros(0, ROW)], [np.zeros(0, ROW)]
        for table in tables:
            rows = table.rows.copy()
            linked = rows["base"] != NO_BASE
            rows["base"][linked] += np.uint32(first_base - len(table))
            first_base += len(rows) - len(table)
            chunks.append(rows[: len(table)])
            bases.append(rows[len(table) :])
        dims = np.concatenate([np.zeros(0, _DIM), *(table.dims for table in tables)])
        return cls(np.concatenate(chunks + bases), dims, num_chunks)

    def __len__(self) -> int:
        return self.num_chunks

    def __iter__(self) -> Iterator[ChunkRecord]:
        for first in range(0, len(self), _BATCH):
            last = min(first + _BATCH, len(self))
            ends = self._ends[first:last].tolist()
            begin = int(self._ends[first - 1]) if first else 0
            places = self.dims[begin : ends[-1]].tolist()
            for row, end in zip(self.rows[first:last].tolist(), ends, strict=True):
                place = places[end - begin - 2 * row[8] : end - begin]
                yield self._record(row, Box(tuple(place[: row[8]]), tuple(place[row[8] :])))

    @overload
    def __getitem__(self, index: int) -> ChunkRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "ChunkTable": ...
    def __getitem__(self, index: int | slice) -> "ChunkRecord | ChunkTable":
        """Return one record, or some of the chunks as a table."""
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        number = range(len(self))[index]
        (start,), (size,) = (part.tolist() for part in self.boxes(np.array([number])))
        return self._record(self.rows[number].tolist(), Box(tuple(start), tuple(size)))

    def _record(self, row: tuple[Any, ...], box: Box) -> ChunkRecord:
        tensor, pack, offset, fingerprint, checksum, num_bytes, base, codec, *_ = row
        below = None if base == NO_BASE else self._record(self.rows[base].tolist(), box)
        return ChunkRecord(tensor, box, Codec(codec), pack, offset, num_bytes, checksum, fingerprint, below)

    @property
    def tensor(self) -> NDArray[np.uint32]:
        """The number of each chunk's tensor."""
        return self.column("tensor")

    @property
    def num_dims(self) -> NDArray[np.uint8]:
        """How many dims each chunk's box has."""
        return self.column("num_dims")

    def column(self, name: str) -> NDArray[Any]:
        """Return a field of every chunk, by its name in ROW."""
        column: NDArray[Any] = self.rows[name][: self.num_chunks]
        return column

    def boxes(self, chunks: NDArray[np.intp]) -> tuple[Places, Places]:
        """Return starts and sizes, [chunk, dim] each, of chunks that all have the same number of dims."""
        num_dims = int(self.num_dims[chunks[0]]) if len(chunks) else 0
        begins = self._ends[chunks] - 2 * num_dims
        places = self.dims[begins[:, None] + np.arange(2 * num_dims)].reshape(len(chunks), 2, num_dims)
        return places[:, 0], places[:, 1]

    def by_tensor(self) -> dict[int, NDArray[np.intp]]:
        """Map each tensor number to the places of its chunks, in order."""
        order = np.argsort(self.tensor, kind="stable")
        numbers, firsts = np.unique(self.tensor[order], return_index=True)
        return dict(zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True)) if len(self) else {}

    def fingerprint_sums(self) -> dict[int, int]:
        """Sum the chunks' fingerprints by tensor number, modulo 2^64."""
        order = np.argsort(self.tensor, kind="stable")
        numbers, firsts = np.unique(self.tensor[order], return_index=True)
        if not len(self):
            return {}
        sums = np.add.reduceat(self.column("fingerprint")[order], firsts)
        return dict(zip(numbers.tolist(), sums.tolist(), strict=True))

    def of_tensors(self, numbers: Collection[int]) -> "ChunkTable":
        """Return the chunks of some tensors, in order."""
        return self.take(np.flatnonzero(np.isin(self.tensor, np.array(sorted(numbers), np.int64))))

    def sorted_by_tensor(self) -> "ChunkTable":
        """Return the chunks in the order of their tensors."""
        if (np.diff(self.tensor.astype(np.int64)) >= 0).all():
            return self
        return self.take(np.argsort(self.tensor, kind="stable"))

    def with_packs(self, numbers: Sequence[int]) -> "ChunkTable":
        """Return the chunks with other pack numbers: what lies in pack p here lies in `numbers[p]` there."""
        rows = self.rows.copy()
        rows["pack"] = np.array(numbers, np.uint32)[rows["pack"]]
        return ChunkTable(rows, self.dims, len(self))

    def take(self, chunks: NDArray[np.intp]) -> "ChunkTable":
        """Return the chunks at these places, and the bases that they need."""
        parts = [self.rows[chunks]]
        first = len(chunks)
        while (linked := parts[-1]["base"] != NO_BASE).any():
            below = self.rows[parts[-1]["base"][linked]]
            parts[-1]["base"][linked] = first + np.arange(len(below), dtype=np.uint32)
            first += len(below)
            parts.append(below)
        counts = 2 * self.num_dims[chunks].astype(np.int64)
        skipped = self._ends[chunks] - np.cumsum(counts)
        dims = self.dims[np.arange(int(counts.sum())) + np.repeat(skipped, counts)]
        return ChunkTable(np.concatenate(parts), dims, len(chunks))

    def owners(self) -> NDArray[np.int64]:
        """Return, for every row, the place of the chunk that it serves: its own, or that of a delta above."""
        owners = np.arange(len(self.rows))
        if len(self.rows) == len(self):
            return owners
        above = np.arange(len(self))
        for _ in range(MAX_CHAIN):
            above = above[self.rows["base"][above] != NO_BASE]
            below = self.rows["base"][above].astype(np.int64)
            owners[below] = owners[above]
            above = below
        return owners


def encode_table(chunks: Sequence[ChunkRecord]) -> bytes:
    """Return the counts of chunks and bases, a row of 56 bytes for each, then the boxes of the chunks.

    Raises FormatError for more than MAX_CHUNKS_PER_PAGE chunks and bases.
    """
    table = ChunkTable.of(chunks)
    if len(table.rows) > MAX_CHUNKS_PER_PAGE:
        raise FormatError(f"{len(table.rows)} chunks do not fit into one table of {MAX_CHUNKS_PER_PAGE}")
    counts = _COUNTS.pack(len(table), len(table.rows) - len(table))
    return counts + table.rows.tobytes() + table.dims.tobytes()


def decode_table(data: memoryview, where: str) -> ChunkTable:
    """Read a table that may be hostile. Raises Corrupt."""
    num_chunks, num_bases = (
        _COUNTS.unpack_from(data) if len(data) >= _COUNTS.size else (MAX_CHUNKS_PER_PAGE + 1, 0)
    )
    num_rows = num_chunks + num_bases
    boxes_at = _COUNTS.size + num_rows * ROW.itemsize
    if num_rows > MAX_CHUNKS_PER_PAGE or len(data) < boxes_at:
        raise Corrupt(f"{where} does not hold the chunks that it counts")
    rows = np.frombuffer(data[_COUNTS.size : boxes_at], ROW)
    rest = data[boxes_at:]
    num_dims = rows["num_dims"].astype(np.int64)
    if (num_dims > MAX_DIMS).any() or len(rest) != 2 * int(num_dims.sum()) * _DIM.itemsize:
        raise Corrupt(f"the boxes in {where} do not have the room they need")
    dims = np.frombuffer(rest, _DIM)
    if (dims < 0).any():
        raise Corrupt(f"a box in {where} starts or reaches below zero")
    if not set(np.unique(rows["codec"]).tolist()) <= set(Codec):
        raise Corrupt(f"{where} holds a chunk of an unknown codec")
    if (np.ascontiguousarray(rows["reserved"]).view("u1") != 0).any():
        raise Corrupt(f"{where} holds a chunk with something in its reserved bytes")
    _check_bases(rows, num_chunks, where)
    return ChunkTable(rows, dims, num_chunks)


def _check_bases(rows: Rows, num_chunks: int, where: str) -> None:
    """Every base serves exactly one delta, before it and of its tensor; and no chain is too long."""
    deltas = np.flatnonzero(rows["base"] != NO_BASE)
    if not len(deltas) and num_chunks == len(rows):
        return
    bases = rows["base"][deltas].astype(np.int64)
    if not np.array_equal(np.sort(bases), np.arange(num_chunks, len(rows))) or (bases <= deltas).any():
        raise Corrupt(f"{where} holds deltas and bases that do not belong together")
    if (rows["tensor"][bases] != rows["tensor"][deltas]).any() or rows["num_dims"][num_chunks:].any():
        raise Corrupt(f"{where} holds a base that is not of the box of its delta")
    above = np.arange(num_chunks)
    for _ in range(MAX_CHAIN + 1):
        below = rows["base"][above]
        above = below[below != NO_BASE].astype(np.int64)
    if above.size:
        raise Corrupt(f"{where} holds a chunk with more than {MAX_CHAIN} bases below it")


def _chain_up(records: list[ChunkRecord]) -> list[int]:
    """Append the bases of all records, level by level; return the place of each record's base."""
    if all(chunk.base is None for chunk in records):
        return [NO_BASE] * len(records)
    bases: list[int] = []
    first, depth = 0, 0
    while first < len(records):
        level, first = records[first:], len(records)
        for chunk in level:
            below = chunk.base
            bases.append(NO_BASE if below is None else len(records))
            if below is None:
                continue
            if (below.tensor, below.box) != (chunk.tensor, chunk.box) or depth == MAX_CHAIN:
                raise FormatError(
                    f"a chunk of tensor number {chunk.tensor} has a base of another box, "
                    f"or more than {MAX_CHAIN} bases below it"
                )
            records.append(below)
        depth += 1
    return bases


def _rows(records: Sequence[ChunkRecord], bases: Sequence[int]) -> Rows:
    rows = np.zeros(len(records), ROW)
    rows["tensor"] = [chunk.tensor for chunk in records]
    rows["pack"] = [chunk.pack for chunk in records]
    rows["offset"] = [chunk.offset for chunk in records]
    rows["fingerprint"] = [chunk.fingerprint for chunk in records]
    rows["checksum"] = np.frombuffer(b"".join(chunk.checksum for chunk in records), "V16")
    rows["num_bytes"] = [chunk.num_bytes for chunk in records]
    rows["codec"] = [chunk.codec for chunk in records]
    rows["base"] = bases
    num_chunks = min((base for base in bases if base != NO_BASE), default=len(records))
    rows["num_dims"][:num_chunks] = [len(chunk.box.size) for chunk in records[:num_chunks]]
    return rows
