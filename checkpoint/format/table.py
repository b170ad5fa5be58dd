"""Many chunk records as bytes: how many, a table of fixed rows, then the starts and sizes of their boxes."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box
from checkpoint.format.records import MAX_CHUNKS_PER_PAGE, MAX_DIMS, ChunkRecord

_ROW = np.dtype(
    {
        "names": ["tensor", "pack", "offset", "fingerprint", "checksum", "num_bytes", "codec", "num_dims"],
        "formats": ["<u4", "<u4", "<u8", "<u8", "V16", "<u4", "u1", "u1"],
        "offsets": [0, 4, 8, 16, 24, 40, 44, 45],
        "itemsize": 48,
    }
)
_COUNT = struct.Struct("<Q")
_DIM = np.dtype("<i8")


def encode_table(chunks: Sequence[ChunkRecord]) -> bytes:
    """Return how many there are, rows of 48 bytes, then each box's starts and sizes as 64-bit integers."""
    if len(chunks) > MAX_CHUNKS_PER_PAGE:
        raise FormatError(f"{len(chunks)} chunks do not fit into one table of {MAX_CHUNKS_PER_PAGE}")
    rows = np.zeros(len(chunks), _ROW)
    rows["tensor"] = [chunk.tensor for chunk in chunks]
    rows["pack"] = [chunk.pack for chunk in chunks]
    rows["offset"] = [chunk.offset for chunk in chunks]
    rows["fingerprint"] = [chunk.fingerprint for chunk in chunks]
    rows["checksum"] = np.frombuffer(b"".join(chunk.checksum for chunk in chunks), "V16")
    rows["num_bytes"] = [chunk.num_bytes for chunk in chunks]
    rows["codec"] = [chunk.codec for chunk in chunks]
    rows["num_dims"] = [len(chunk.box.size) for chunk in chunks]
    dims = [n for chunk in chunks for n in (*chunk.box.start, *chunk.box.size)]
    return _COUNT.pack(len(chunks)) + rows.tobytes() + np.array(dims, _DIM).tobytes()


def decode_table(data: memoryview, where: str) -> tuple[ChunkRecord, ...]:
    """Read a table that may be hostile. Raises Corrupt."""
    num_chunks = _COUNT.unpack_from(data)[0] if len(data) >= _COUNT.size else MAX_CHUNKS_PER_PAGE + 1
    boxes_at = _COUNT.size + num_chunks * _ROW.itemsize
    if num_chunks > MAX_CHUNKS_PER_PAGE or len(data) < boxes_at:
        raise Corrupt(f"{where} does not hold the chunks that it counts")
    rows = np.frombuffer(data[_COUNT.size : boxes_at], _ROW)
    rest = data[boxes_at:]
    num_dims = rows["num_dims"].astype(np.int64)
    if (num_dims > MAX_DIMS).any() or len(rest) != 2 * int(num_dims.sum()) * _DIM.itemsize:
        raise Corrupt(f"the boxes in {where} do not have the room they need")
    dims = np.frombuffer(rest, _DIM)
    if (dims < 0).any():
        raise Corrupt(f"a box in {where} starts or reaches below zero")
    if not set(np.unique(rows["codec"]).tolist()) <= set(Codec):
        raise Corrupt(f"{where} holds a chunk of an unknown codec")
    ends = np.cumsum(2 * num_dims).tolist()
    places = dims.tolist()
    return tuple(
        _chunk(row, places[end - 2 * row[-1] : end]) for row, end in zip(rows.tolist(), ends, strict=True)
    )


def _chunk(row: tuple[Any, ...], place: list[int]) -> ChunkRecord:
    tensor, pack, offset, fingerprint, checksum, num_bytes, codec, num_dims = row
    box = Box(tuple(place[:num_dims]), tuple(place[num_dims:]))
    return ChunkRecord(tensor, box, Codec(codec), pack, offset, num_bytes, checksum, fingerprint)
