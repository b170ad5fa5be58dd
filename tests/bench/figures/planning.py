"""What one rank of thousands has to know before it reads: its share of a checkpoint of many chunks."""

import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from checkpoint import Manifest
from checkpoint.format.codec import Codec
from checkpoint.format.records import MAX_CHUNK_BYTES, PackRef, TensorRecord
from checkpoint.format.table import NO_BASE, ROW, ChunkTable
from checkpoint.interop.conversion.sharing import plan_rank
from tests.bench.harness import Effort, Goal, Row, row

LAYOUT = "replica=8,shard=64,tensor=8"  # 4,096 ranks
_CHUNKS_OF_TENSOR = 500
_SIDE = 1024  # a chunk is 1024 x 1024 elements of fp32: 4 MiB
_RANK = 2741
_MOST = 1_000_000
_SCALES = (10_000, 100_000, 250_000, _MOST)


def planning(effort: Effort) -> list[Row]:
    """Measure a rank's plan, from the index in memory to its ranges; and whether it grows with the chunks."""
    rounds = 1 if effort is Effort.QUICK else 3
    taken = {}
    for num_chunks in _SCALES:
        manifest, table = _index_of(num_chunks // _CHUNKS_OF_TENSOR)
        taken[num_chunks] = median(_planning_s(manifest, table) for _ in range(rounds))
    rows = [
        row(
            f"planning: one of 4,096 ranks, {num_chunks:,} chunks",
            "s",
            ours=seconds,
            goal=Goal("<=", 60.0) if num_chunks == _MOST else None,
        )
        for num_chunks, seconds in taken.items()
    ]
    growth = (taken[_MOST] / taken[_SCALES[2]]) / (_MOST / _SCALES[2])
    label = "planning: growth from 250,000 to 1,000,000 chunks, of linear"
    return [*rows, row(label, "", ours=growth, goal=Goal("<=", 1.5))]


def _planning_s(manifest: Manifest, table: ChunkTable) -> float:
    started = time.perf_counter()
    plan_rank(manifest, table, LAYOUT, _RANK)
    return time.perf_counter() - started


def _index_of(num_tensors: int) -> tuple[Manifest, ChunkTable]:
    """Make the index of a checkpoint without content: tensors of 500 chunks, each tensor a pack."""
    num_chunks = num_tensors * _CHUNKS_OF_TENSOR
    numbers = np.arange(num_chunks)
    rows = np.zeros(num_chunks, ROW)
    rows["tensor"] = rows["pack"] = numbers // _CHUNKS_OF_TENSOR
    rows["offset"] = numbers % _CHUNKS_OF_TENSOR * MAX_CHUNK_BYTES
    rows["num_bytes"], rows["base"], rows["codec"], rows["num_dims"] = MAX_CHUNK_BYTES, NO_BASE, Codec.RAW, 2
    dims = np.zeros((num_chunks, 4), np.int64)
    dims[:, 0] = numbers % _CHUNKS_OF_TENSOR * _SIDE
    dims[:, 2:] = _SIDE
    return _manifest(num_tensors), ChunkTable(rows, dims.reshape(-1), num_chunks)


def _manifest(num_tensors: int) -> Manifest:
    shape = (_CHUNKS_OF_TENSOR * _SIDE, _SIDE)
    names: Sequence[str] = [f"model/layers.{number}.weight" for number in range(num_tensors)]
    return Manifest(
        run="bench",
        step=1,
        generation=0,
        token="",
        created_utc="",
        spec_digest="",
        tensors=tuple(TensorRecord(name, "float32", shape, 0) for name in names),
        packs=tuple(
            PackRef(f"packs/000000-local-{number:06d}", _CHUNKS_OF_TENSOR * MAX_CHUNK_BYTES)
            for number in range(num_tensors)
        ),
        pages=(),
        skeleton=None,
        meta={},
    )
