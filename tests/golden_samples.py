"""What the golden checkpoints of version 1 hold, and the writer that once made them.

Three steps of a run, with every codec: weights as byte planes, then as a delta, then as a delta on top of
that; a zstandard frame, raw bytes, and tensors that did not change and are stored once.
"""

from dataclasses import dataclass, replace

import numpy as np

from checkpoint.format.codec import Codec, checksum, encode, xor_bytes
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.keys import manifest_key, pack_key, page_key
from checkpoint.format.layout import Box, split_box
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    PackRef,
    TensorRecord,
    encode_manifest,
    encode_pages,
    page_ref,
)
from checkpoint.format.pack import PackBuilder, PackedTensor
from checkpoint.format.table import ChunkTable
from checkpoint.format.tree import Json
from checkpoint.store.contract import Store
from tests.format_samples import HOST, Bits

STEPS = (4, 5, 6)
_CODECS = {"model/weights": Codec.PLANES, "model/table": Codec.ZSTD}
_MAX_CHUNK_BYTES = 8192


def golden_tensors(step: int) -> dict[str, tuple[str, Bits]]:
    """Return a step's tensors as (dtype name, bits): floats that move a little, and others that do not."""
    count = np.arange(64 * 48, dtype=np.uint64)
    mixed = (count + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(20)
    exponent = np.uint64(110) + (mixed & np.uint64(7)) + (mixed >> np.uint64(3) & np.uint64(3))
    floats = (mixed >> np.uint64(20) & np.uint64(0x807FFFFF)) | exponent << np.uint64(23)
    moved = floats ^ (mixed & np.uint64(0x1FF)) * np.uint64(step - STEPS[0])
    return {
        "model/weights": ("float32", moved.astype(np.uint32).reshape(64, 48)),
        "model/table": ("int64", (count[:512] // np.uint64(7)).reshape(2, 256)),
        "model/bias": ("bfloat16", (floats[:17] >> np.uint64(16)).astype(np.uint16)),
        "optimizer/step": ("int64", np.array(step, np.uint64)),
        "optimizer/none": ("float64", np.zeros((0, 3), np.uint64)),
    }


def golden_skeleton(step: int) -> dict[str, Json]:
    """Return the state around a step's tensors; one of them is there twice."""
    state: dict[str, Json] = {name: {"$": "tensor", "name": name} for name in golden_tensors(step)}
    tied: Json = {"$": "tensor", "name": "model/weights"}
    return state | {"tied": tied, "betas": {"$": "tuple", "items": [0.9, 0.999]}}


@dataclass(frozen=True, slots=True)
class _Earlier:
    """A chunk of the step before, and its content."""

    record: ChunkRecord
    raw: bytes


def write_golden(store: Store) -> None:
    """Write the checkpoints of all steps, as one host would."""
    earlier: dict[tuple[int, Box], _Earlier] = {}
    packs: list[PackRef] = []
    for step in STEPS:
        builder = PackBuilder(1, HOST, step)
        chunks: list[ChunkRecord] = []
        tensors = golden_tensors(step)
        for number, (name, (dtype, bits)) in enumerate(tensors.items()):
            for box in split_box(Box.whole(bits.shape), bits.itemsize, _MAX_CHUNK_BYTES):
                raw = bits[box.within(Box.whole(bits.shape))].tobytes()
                below = earlier.get((number, box))
                if below is not None and below.raw == raw:
                    chunks.append(below.record)
                    continue
                delta = raw if below is None else xor_bytes(raw, below.raw)
                codec, stored = encode(_CODECS.get(name, Codec.RAW), delta, dtype=dtype)
                mark = fingerprint(raw, dtype, bits.shape, box)
                record = ChunkRecord(number, box, codec, len(packs), 0, 0, checksum(raw), mark)
                record = replace(record, base=None if below is None else below.record)
                chunks.append(builder.add(record, stored))
                earlier[number, box] = _Earlier(chunks[-1], raw)
        described = [PackedTensor(name, dtype, bits.shape) for name, (dtype, bits) in tensors.items()]
        pack = builder.seal(described)
        packs.append(PackRef(pack_key(1, HOST, step), len(pack)))
        store.put_new(packs[-1].key, pack)
        _write_manifest(store, step, ChunkTable.of(chunks), packs)


def _write_manifest(store: Store, step: int, chunks: ChunkTable, packs: list[PackRef]) -> None:
    sums = chunks.fingerprint_sums()
    ((page, num_chunks),) = encode_pages(chunks)
    key = page_key(1, step, HOST, 1)
    manifest = Manifest(
        run="golden",
        step=step,
        generation=1,
        token="token",
        created_utc="2026-11-21T12:00:00Z",
        spec_digest="00ff",
        tensors=tuple(
            TensorRecord(name, dtype, bits.shape, sums.get(number, 0))
            for number, (name, (dtype, bits)) in enumerate(golden_tensors(step).items())
        ),
        packs=tuple(packs),
        pages=(page_ref(key, page, num_chunks),),
        skeleton=golden_skeleton(step),
        data_cursor={"epoch": 1, "sample": 640},
        metrics={"loss": 2.5, "grad_norm": float("inf")},
        meta={"note": "made by hand"},
    )
    store.put_new(key, page)
    store.put_new(manifest_key(step), encode_manifest(manifest))
