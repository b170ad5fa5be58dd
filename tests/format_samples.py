"""A small checkpoint made by hand, from the format alone: what readers are tested on without any writer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from checkpoint.format.codec import Codec, checksum, encode
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.format.keys import manifest_key, pack_key, page_key
from checkpoint.format.layout import Box, split_box
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    PackRef,
    TensorRecord,
    encode_manifest,
    encode_page,
    page_ref,
)
from checkpoint.format.pack import PackBuilder, PackedTensor
from checkpoint.store.contract import Store

Bits = np.ndarray[Any, Any]
HOST = "h0"


def sample_tensors(seed: int = 0) -> dict[str, tuple[str, Bits]]:
    """Return a few tensors as (dtype name, bits), among them a 0-d and an empty one."""
    mixed = (np.arange(400, dtype=np.uint64) + np.uint64(1000 * seed)) * np.uint64(0x9E3779B97F4A7C15)
    return {
        "model/weight": ("float32", (mixed[:384] >> np.uint64(32)).astype(np.uint32).reshape(24, 16)),
        "model/bias": ("bfloat16", (mixed[384:] >> np.uint64(48)).astype(np.uint16)),
        "optimizer/step": ("int64", np.array(7, np.uint64)),
        "optimizer/none": ("float64", np.zeros((0, 3), np.uint64)),
    }


def write_checkpoint(
    store: Store,
    step: int,
    tensors: Mapping[str, tuple[str, Bits]] | None = None,
    *,
    generation: int = 1,
    codec: Codec = Codec.ZSTD,
    max_chunk_bytes: int = 512,
) -> Manifest:
    """Write a checkpoint as one host would: a pack, a page, the manifest. Return the manifest."""
    tensors = sample_tensors(step) if tensors is None else tensors
    described = [PackedTensor(name, dtype, bits.shape) for name, (dtype, bits) in tensors.items()]
    builder = PackBuilder(generation, HOST, step)
    chunks: list[ChunkRecord] = []
    for number, (dtype, bits) in enumerate(tensors.values()):
        for box in split_box(Box.whole(bits.shape), dtype_of(dtype).itemsize, max_chunk_bytes):
            raw = np.ascontiguousarray(bits[box.within(Box.whole(bits.shape))]).tobytes()
            mark = fingerprint(raw, dtype, bits.shape, box)
            used, stored = encode(codec, raw, dtype=dtype)
            chunk = ChunkRecord(number, box, used, 0, 0, 0, checksum(raw), mark)
            chunks.append(builder.add(chunk, stored))
    pack = builder.seal(described)
    page = encode_page(chunks)
    manifest = Manifest(
        run="sample",
        step=step,
        generation=generation,
        token="token",
        created_utc="2026-11-20T12:00:00Z",
        spec_digest="00ff",
        tensors=tuple(_record(number, one, chunks) for number, one in enumerate(described)),
        packs=(PackRef(pack_key(generation, HOST, step), len(pack)),),
        pages=(page_ref(page_key(generation, step, HOST, 1), page, len(chunks)),),
        skeleton={name: {"$": "tensor", "name": name} for name in tensors},
        data_cursor={"epoch": 0, "position": step},
        metrics={"loss": 0.5, "grad_norm": math.inf},
        meta={"note": "made by hand"},
    )
    store.put_new(manifest.packs[0].key, pack)
    store.put_new(manifest.pages[0].key, page)
    store.put_new(manifest_key(step), encode_manifest(manifest))
    return manifest


def _record(number: int, tensor: PackedTensor, chunks: Sequence[ChunkRecord]) -> TensorRecord:
    total = sum(chunk.fingerprint for chunk in chunks if chunk.tensor == number) % MODULUS
    return TensorRecord(tensor.name, tensor.dtype, tensor.shape, total)
