"""Packs: many chunks in one object, aligned, with an index of their own at the end.

    chunk, sums of its blocks, zeros to the next 64 bytes, chunk, ... index, trailer of 32 bytes

A checkpoint is read through its manifest and pages; the index lets a pack be understood without them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from checkpoint.errors import Corrupt
from checkpoint.format.codec import Buffer, Codec
from checkpoint.format.json_fields import Fields, dump_json, parse_json
from checkpoint.format.keys import MAX_GENERATION, MAX_PACK_SEQ
from checkpoint.format.records import MAX_LISTED, ChunkRecord, dtype_from_json, shape_from_json
from checkpoint.format.sealed import seal, unseal
from checkpoint.format.table import ChunkTable, decode_table, encode_table
from checkpoint.format.tree import Json

ALIGNMENT = 64
TRAILER_BYTES = 32
COPIED_BELOW = 64 << 10  # so many parts would take longer than their copies
_MAGIC = b"HOLDFASTPACK\0\0\0\0"
_LENGTH_BYTES = 8
_ZEROS = bytes(ALIGNMENT)
ELSEWHERE = 2**32 - 1  # the pack number of a base, which lies in an earlier pack: its checksum tells which


class Described(Protocol):
    """Whatever has a tensor's name, dtype and shape."""

    @property
    def name(self) -> str:
        """Its fully qualified name."""

    @property
    def dtype(self) -> str:
        """The name of its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its global shape."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor that has chunks in a pack, as the pack's index describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackIndex:
    """What a pack says about itself; `tensors` by the numbers that its chunks call them."""

    generation: int
    host: str
    seq: int
    tensors: Mapping[int, PackedTensor]
    chunks: ChunkTable


class PackBuilder:
    """Collects stored chunks; `seal` returns the pack, `seal_parts` the same in parts, not joined.

    Chunks of COPIED_BELOW bytes and more are not copied before: they must stay as they are until then.
    """

    def __init__(self, generation: int, host: str, seq: int) -> None:
        self._head = {"generation": generation, "host": host, "seq": seq}
        self._parts: list[Buffer] = []
        self._copied: bytearray | None = None  # the last part, if more small ones go there
        self._num_bytes = 0
        self._chunks: list[ChunkRecord] = []
        self._num_rows = 0

    @property
    def num_bytes(self) -> int:
        """Bytes collected so far, without the index."""
        return self._num_bytes

    @property
    def num_chunks(self) -> int:
        """Chunks collected so far, and the bases of deltas among them; at most 65536 fit."""
        return self._num_rows

    def add(self, chunk: ChunkRecord, stored: Buffer, pack: int | None = None) -> ChunkRecord:
        """Append a chunk's stored bytes; return its record with the place they have here.

        With a number the record's pack is called so, else as it was.
        """
        if gap := -self._num_bytes % ALIGNMENT:
            self._append(_ZEROS[:gap])
        view = memoryview(stored).cast("B")
        placed = ChunkRecord(  # three times as fast as `replace`, for thousands of small chunks
            chunk.tensor,
            chunk.box,
            chunk.codec,
            chunk.pack if pack is None else pack,
            self._num_bytes,
            len(view),
            chunk.checksum,
            chunk.fingerprint,
            chunk.base,
        )
        self._append(view)
        if chunk.sums and chunk.codec is Codec.RAW and chunk.base is None:
            self._append(chunk.sums)
        self._num_rows += 1 if chunk.base is None else 1 + chunk.num_bases
        self._chunks.append(placed)
        return placed

    def seal(self, tensors: Sequence[Described]) -> bytearray:
        """Append index and trailer and return the pack; `tensors` is the list that the chunks count in."""
        return bytearray().join(self.seal_parts(tensors))

    def seal_parts(self, tensors: Sequence[Described]) -> list[Buffer]:
        """Append index and trailer and return the pack in parts, one after the other."""
        numbers = sorted({chunk.tensor for chunk in self._chunks})
        described = [
            {"number": n, "name": tensors[n].name, "dtype": tensors[n].dtype, "shape": tensors[n].shape}
            for n in numbers
        ]
        head = dump_json({**self._head, "tensors": described}, "a pack's index")
        table = ChunkTable.of([chunk if chunk.base is None else _numbered(chunk) for chunk in self._chunks])
        table.rows["pack"] = ELSEWHERE
        table.rows["pack"][: len(table)] = 0
        index = seal("pack", len(head).to_bytes(_LENGTH_BYTES, "little") + head + encode_table(table))
        self._append(bytes(-self._num_bytes % ALIGNMENT))
        offset = self._num_bytes
        self._append(index)
        self._append(offset.to_bytes(8, "little") + len(index).to_bytes(8, "little") + _MAGIC)
        return self._parts

    def _append(self, data: bytes | memoryview) -> None:
        self._num_bytes += len(data)
        if len(data) >= COPIED_BELOW:
            self._parts.append(data)
            self._copied = None
        elif self._copied is None:
            self._copied = bytearray(data)
            self._parts.append(self._copied)
        else:
            self._copied += data


def _numbered(chunk: ChunkRecord) -> ChunkRecord:
    """Return a chunk whose bases have a pack number that a row can hold; what it is does not matter here."""
    if chunk.base is None:
        return chunk
    return replace(chunk, base=replace(_numbered(chunk.base), pack=ELSEWHERE))


def index_range(trailer: Buffer, num_bytes: int, where: str) -> tuple[int, int]:
    """Return offset and length of a pack's index, from its size and last 32 bytes. Raises Corrupt."""
    raw = bytes(trailer)
    offset, length = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")
    if len(raw) != TRAILER_BYTES or raw[16:] != _MAGIC or offset + length + TRAILER_BYTES != num_bytes:
        raise Corrupt(f"{where} does not end as a pack does: it was cut short, or is something else")
    return offset, length


def decode_pack_index(data: Buffer, num_bytes: int, where: str = "a pack") -> PackIndex:
    """Read a pack's index, which may be hostile, out of a pack of this size. Raises Corrupt, Unsupported."""
    head, table = _cut(unseal("pack", data, where), where)
    fields = Fields(parse_json(head, where), where)
    index = PackIndex(
        generation=fields.count("generation", MAX_GENERATION),
        host=fields.text("host", r"[a-z0-9]{1,32}"),
        seq=fields.count("seq", MAX_PACK_SEQ),
        tensors=dict(_tensor(node, where) for node in fields.items("tensors", MAX_LISTED)),
        chunks=decode_table(table, where),
    )
    fields.end()
    chunks = index.chunks
    ends = chunks.column("num_bytes").astype(np.uint64)
    outside = (ends > num_bytes) | (chunks.column("offset") > num_bytes - np.minimum(ends, num_bytes))
    if outside.any() or not set(np.unique(chunks.tensor).tolist()) <= index.tensors.keys():
        raise Corrupt(f"a chunk in the index of {where} lies outside of it, or belongs to no tensor it lists")
    return index


def _tensor(node: Json, where: str) -> tuple[int, PackedTensor]:
    fields = Fields(node, f"a tensor in {where}")
    number = fields.count("number", MAX_LISTED)
    name, dtype = fields.text("name"), dtype_from_json(fields, where)
    tensor = PackedTensor(name, dtype, shape_from_json(fields, dtype, where))
    fields.end()
    return number, tensor


def _cut(body: memoryview, where: str) -> tuple[memoryview, memoryview]:
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    if end > len(body):
        raise Corrupt(f"the head of the index of {where} is longer than all of it")
    return body[_LENGTH_BYTES:end], body[end:]
