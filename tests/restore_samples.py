"""Checkpoints cut in any way, by hand: boxes, codecs, packs, pages, deltas, reuse; and faulty reads."""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from checkpoint.format.blocks import sums_of
from checkpoint.format.codec import Codec, checksum, encode, xor_bytes
from checkpoint.format.dtypes import DTYPES
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.format.keys import manifest_key, pack_key, page_key
from checkpoint.format.layout import Box
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    PackRef,
    PageRef,
    TensorRecord,
    encode_manifest,
    encode_page,
    page_ref,
)
from checkpoint.format.pack import PackBuilder, PackedTensor
from checkpoint.store.contract import Buffer, ByteRange, Entry, Store
from checkpoint.store.memory import MemoryStore

Bits = np.ndarray[Any, Any]
Tensors = Mapping[str, tuple[str, Bits]]
HOST = "h0"


@dataclass(slots=True)
class Written:
    """A checkpoint that was written, and where its chunks lie by tensor name and box."""

    manifest: Manifest
    tensors: Tensors
    records: dict[tuple[str, Box], tuple[ChunkRecord, PackRef]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a checkpoint is written: which codec a chunk gets, and which earlier checkpoint it builds on."""

    codec: Callable[[], Codec] = lambda: Codec.RAW
    num_packs: int = 1
    chunks_per_page: int = 1000
    earlier: Written | None = None
    hosts: str = HOST
    has_sums: bool = True


def random_bits(chance: random.Random, dtype: str, shape: tuple[int, ...]) -> Bits:
    """Return random elements: any bits, but truth values for bool."""
    kind = DTYPES[dtype]
    num_bytes = int(np.prod(shape)) * kind.itemsize
    raw: Bits = np.frombuffer(bytearray(chance.randbytes(num_bytes)), np.uint8)
    if dtype == "bool":
        raw = raw & np.uint8(1)
    return raw.view(kind.carrier).reshape(shape)


def random_cuts(chance: random.Random, box: Box, depth: int) -> list[Box]:
    """Cut a box into boxes that cover it exactly once, along random dims."""
    dims = [dim for dim, size in enumerate(box.size) if size > 1]
    if not depth or not dims or box.is_empty:
        return [] if box.is_empty else [box]
    dim = chance.choice(dims)
    at = chance.randint(1, box.size[dim] - 1)
    first, second = list(box.size), list(box.size)
    first[dim], second[dim] = at, box.size[dim] - at
    start = list(box.start)
    start[dim] += at
    parts = Box(box.start, tuple(first)), Box(tuple(start), tuple(second))
    return [
        cut
        for part in parts
        for cut in random_cuts(chance, part, depth - chance.randint(1, 2) if depth > 1 else 0)
    ]


def write_cut(
    store: Store,
    step: int,
    tensors: Tensors,
    boxes: Mapping[str, Sequence[Box]],
    manner: Manner | None = None,
) -> Written:
    """Write a checkpoint whose tensors are stored in the given boxes, in that order, dealt over the packs.

    With an earlier checkpoint, a chunk of the same tensor and box is reused if it is equal, and the base of a
    delta otherwise.
    """
    manner = manner or Manner()
    described = [PackedTensor(name, dtype, bits.shape) for name, (dtype, bits) in tensors.items()]
    keys = [pack_key(1, manner.hosts, step * 100 + number) for number in range(manner.num_packs)]
    builders = [PackBuilder(1, manner.hosts, step * 100 + number) for number in range(manner.num_packs)]
    packs: dict[str, int] = {key: number for number, key in enumerate(keys)}
    sizes: dict[str, int] = {}
    chunks: list[ChunkRecord] = []
    turn = 0

    def moved(record: ChunkRecord, home: Written) -> ChunkRecord:
        """Number an earlier checkpoint's packs among those of this one."""
        ref = home.manifest.packs[record.pack]
        sizes[ref.key] = ref.num_bytes
        base = None if record.base is None else moved(record.base, home)
        return replace(record, pack=packs.setdefault(ref.key, len(packs)), base=base)

    for number, (name, (dtype, bits)) in enumerate(tensors.items()):
        for box in boxes[name]:
            raw = np.ascontiguousarray(bits[box.within(Box.whole(bits.shape))]).tobytes()
            mark = fingerprint(raw, dtype, bits.shape, box)
            old = manner.earlier.records.get((name, box)) if manner.earlier else None
            base = moved(old[0], manner.earlier) if old and manner.earlier else None
            if base is not None and (base.checksum, base.fingerprint) == (checksum(raw), mark):
                chunks.append(replace(base, tensor=number))
                continue
            body: Buffer = raw
            if base is not None and manner.earlier:
                before = manner.earlier.tensors[name][1][box.within(Box.whole(bits.shape))]
                body = xor_bytes(raw, np.ascontiguousarray(before).tobytes())
            used, stored = encode(manner.codec(), body, dtype=dtype)
            chunk = ChunkRecord(number, box, used, turn % manner.num_packs, 0, 0, checksum(raw), mark, base)
            if manner.has_sums:
                chunk = replace(chunk, sums=sums_of(raw, dtype, bits.shape, box))
            chunks.append(builders[turn % manner.num_packs].add(chunk, stored))
            turn += 1
    for key, builder in zip(keys, builders, strict=True):
        data = builder.seal(described)
        sizes[key] = len(data)
        store.put_new(key, data)
    refs = tuple(PackRef(key, sizes[key]) for key in packs)
    manifest = Manifest(
        run="sample",
        step=step,
        generation=1,
        token="token",
        created_utc="2026-11-20T12:00:00Z",
        spec_digest="",
        tensors=tuple(_record(number, one, chunks) for number, one in enumerate(described)),
        packs=refs,
        pages=_write_pages(store, step, chunks, manner),
        skeleton={name: {"$": "tensor", "name": name} for name in tensors},
        data_cursor=None,
        metrics={},
        meta={},
    )
    store.put_new(manifest_key(step), encode_manifest(manifest))
    names = [one.name for one in described]
    records = {(names[chunk.tensor], chunk.box): (chunk, refs[chunk.pack]) for chunk in chunks}
    return Written(manifest, tensors, records)


def _write_pages(
    store: Store, step: int, chunks: Sequence[ChunkRecord], manner: Manner
) -> tuple[PageRef, ...]:
    pages: list[PageRef] = []
    for first in range(0, len(chunks), manner.chunks_per_page):
        part = chunks[first : first + manner.chunks_per_page]
        key, data = page_key(1, step, manner.hosts, len(pages) + 1), encode_page(part)
        store.put_new(key, data)
        pages.append(page_ref(key, data, len(part)))
    return tuple(pages)


def _record(number: int, tensor: PackedTensor, chunks: Sequence[ChunkRecord]) -> TensorRecord:
    total = sum(chunk.fingerprint for chunk in chunks if chunk.tensor == number) % MODULUS
    return TensorRecord(tensor.name, tensor.dtype, tensor.shape, total)


def copy_store(store: MemoryStore, name: str = "copy") -> MemoryStore:
    """Return a store with the same values."""
    copied = MemoryStore(name)
    for entry in store.list(""):
        copied.put(entry.key, bytes(store.read(entry.key)[0]))
    return copied


class Unsteady:
    """A store whose reads are broken by a function: of their number and what was read, in any thread."""

    def __init__(self, store: Store, broken: Callable[[int, str, list[Buffer]], list[Buffer]]) -> None:
        self._store = store
        self._broken = broken
        self._lock = threading.Lock()
        self.num_reads = 0

    def __str__(self) -> str:
        return str(self._store)

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Read, then break what was read."""
        with self._lock:
            self.num_reads += 1
            number = self.num_reads
        return self._broken(number, key, self._store.read(key, ranges))

    def list(self, prefix: str) -> list[Entry]:
        """List as the store does."""
        return self._store.list(prefix)

    def put_new(self, key: str, data: Any) -> None:
        """Write as the store does."""
        self._store.put_new(key, data)

    def put(self, key: str, data: Any) -> None:
        """Write as the store does."""
        self._store.put(key, data)

    def delete(self, key: str) -> None:
        """Delete as the store does."""
        self._store.delete(key)
