"""Holding a table of chunks against the tensors and packs that it speaks of, all chunks at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt
from checkpoint.format.codec import Codec
from checkpoint.format.dtypes import DTYPES
from checkpoint.format.records import MAX_CHUNK_BYTES, PackRef, TensorRecord
from checkpoint.format.table import ChunkTable


def check_table(
    table: ChunkTable, tensors: Sequence[TensorRecord], packs: Sequence[PackRef], where: str
) -> None:
    """Raise Corrupt, naming the first one, if a chunk cannot be what it says.

    Afterwards every box lies in its tensor, every range in its pack, and no chunk is larger, raw or stored,
    than a chunk may be; bases of deltas included.
    """
    wrong = _first(table.tensor >= len(tensors))
    if wrong is not None:
        number = table.tensor[wrong]
        raise Corrupt(f"a chunk in {where} belongs to the tensor number {number} of {len(tensors)}")
    _check_sizes(table, raw_sizes(table, tensors, where), where)
    _check_packs(table, packs, where)


def raw_sizes(table: ChunkTable, tensors: Sequence[TensorRecord], where: str) -> NDArray[np.int64]:
    """Return how many raw bytes each chunk has. Raises Corrupt if a box does not lie within its tensor."""
    sizes = np.zeros(len(table), np.int64)
    for num_dims in np.unique(table.num_dims).tolist():
        chunks = np.flatnonzero(table.num_dims == num_dims)
        numbers, inverse = np.unique(table.tensor[chunks], return_inverse=True)
        named = [tensors[number] for number in numbers.tolist()]
        fits = np.array([len(tensor.shape) == num_dims for tensor in named])
        shapes = np.array(
            [tensor.shape if len(tensor.shape) == num_dims else (0,) * num_dims for tensor in named], np.int64
        ).reshape(len(named), num_dims)[inverse]
        starts, reach = table.boxes(chunks)
        outside = (reach < 1) | (reach > shapes) | (starts > shapes - reach)
        wrong = _first(outside.any(axis=1) | ~fits[inverse])
        if wrong is not None:
            chunk = table[int(chunks[wrong])]
            tensor = tensors[chunk.tensor]
            raise Corrupt(
                f"a chunk in {where} does not lie within {tensor.name} of shape {tensor.shape}: {chunk.box}"
            )
        itemsizes = np.array([DTYPES[tensor.dtype].itemsize for tensor in named], np.int64)
        sizes[chunks] = reach.prod(axis=1) * itemsizes[inverse]
    return sizes


def _check_sizes(table: ChunkTable, raw: NDArray[np.int64], where: str) -> None:
    raw = raw[table.owners()]
    stored = table.rows["num_bytes"].astype(np.int64)
    as_it_is = table.rows["codec"] == Codec.RAW
    most = np.where(as_it_is, raw, raw + raw // 64 + 1024)
    wrong = _first((raw > MAX_CHUNK_BYTES) | (stored > most) | (stored < np.where(as_it_is, raw, 1)))
    if wrong is not None:
        raise Corrupt(
            f"a chunk of tensor number {table.rows['tensor'][wrong]} in {where} "
            f"cannot store {raw[wrong]} bytes in {stored[wrong]}"
        )


def _check_packs(table: ChunkTable, packs: Sequence[PackRef], where: str) -> None:
    numbers, inverse = np.unique(table.rows["pack"], return_inverse=True)
    if numbers.size and numbers[-1] >= len(packs):
        raise Corrupt(f"a chunk in {where} lies in the pack number {numbers[-1]} of {len(packs)}")
    sizes = np.array([packs[number].num_bytes for number in numbers.tolist()], np.uint64)[inverse]
    stored = table.rows["num_bytes"].astype(np.uint64)
    wrong = _first((stored > sizes) | (table.rows["offset"] > sizes - np.minimum(stored, sizes)))
    if wrong is not None:
        raise Corrupt(f"a chunk in {where} reaches beyond the end of {packs[table.rows['pack'][wrong]].key}")


def _first(wrong: NDArray[np.bool_]) -> int | None:
    """Return the place of the first that is wrong."""
    return int(wrong.argmax()) if wrong.any() else None
