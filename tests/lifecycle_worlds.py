"""Small checkpoints that share packs, and actors on one store that take turns at every single request."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import count

import numpy as np

from checkpoint.engine.naming import PackNames
from checkpoint.engine.receipt import Receipt, write_receipt
from checkpoint.engine.sweeps import look_up
from checkpoint.errors import AlreadyExists, Conflict, NotFound
from checkpoint.format.codec import Codec, checksum, encode, xor_bytes
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.keys import PackKey, manifest_key, pack_key, page_key
from checkpoint.format.layout import Box
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    PackRef,
    TensorRecord,
    chunks_of_page,
    encode_manifest,
    encode_page,
    page_ref,
)
from checkpoint.format.pack import PackBuilder, PackedTensor
from checkpoint.store.contract import Buffer, ByteRange, Entry, Store
from checkpoint.store.memory import MemoryStore

SHAPE = (16,)
_LIVES = count()


class Clock:
    """A time that tests set."""

    def __init__(self, now_s: float = 1e6) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def save(
    store: Store,
    step: int,
    values: Sequence[int],
    known: Manifest | None = None,
    *,
    generation: int = 1,
    host: str = "h0",
    life: str = "",
) -> Manifest | None:
    """Save a checkpoint as a keeper does: each value is a tensor with a pack of its own, or the known one's.

    Its host lives anew each time, unless its `life` is named. Returns None if what was known cannot be built
    on any more.
    """
    tensors, packs, chunks = [], [], []
    names = PackNames(host, life or f"{next(_LIVES):016x}")
    old = {} if known is None else _chunks_by_content(store, known)
    for number, value in enumerate(values):
        raw = np.full(SHAPE, value, "<i4").tobytes()
        mark = fingerprint(raw, "int32", SHAPE, Box.whole(SHAPE))
        tensors.append(TensorRecord(f"t{number}", "int32", SHAPE, mark))
        found = old.get((checksum(raw), mark))
        if found is None:
            chunk = ChunkRecord(number, Box.whole(SHAPE), Codec.RAW, 0, 0, 0, checksum(raw), mark)
            chunk, pack = _write_pack(store, names.take(generation), chunk, raw)
        else:
            chunk, pack = found
        if pack not in packs:
            packs.append(pack)
        place = packs.index(pack)
        chunks.append(
            ChunkRecord(number, chunk.box, chunk.codec, place, chunk.offset, chunk.num_bytes, *_marks(chunk))
        )
    manifest = _announced(store, (generation, step, host), tensors, packs, chunks)
    objects = [
        *((pack.key, pack.num_bytes) for pack in manifest.packs),
        *((page.key, page.num_bytes) for page in manifest.pages),
    ]
    if not look_up(store, objects).is_firm:
        return None
    store.put_new(manifest_key(step), encode_manifest(manifest))
    return manifest


def write_chain(store: Store, num_steps: int) -> list[Manifest]:
    """Save a tensor that changes at every step, each time as what differs from the step before."""
    manifests: list[Manifest] = []
    below: ChunkRecord | None = None
    packs: list[PackRef] = []
    before = bytes(4096)
    for step in range(1, num_steps + 1):
        raw = np.random.default_rng(step).integers(0, 1 << step, 1024, "<i4").tobytes()
        box = Box.whole((1024,))
        codec, stored = encode(Codec.ZSTD, raw if below is None else xor_bytes(raw, before))
        mark = fingerprint(raw, "int32", (1024,), box)
        chunk = ChunkRecord(0, box, codec, len(packs), 0, 0, checksum(raw), mark, below)
        builder = PackBuilder(1, "h0", step)
        below = builder.add(chunk, stored)
        data = builder.seal([PackedTensor("t", "int32", (1024,))])
        packs.append(PackRef(pack_key(1, "h0", step), len(data)))
        store.put_new(packs[-1].key, bytes(data))
        tensor = TensorRecord("t", "int32", (1024,), mark)
        manifests.append(_announced(store, (1, step, "h0"), [tensor], packs, [below]))
        store.put_new(manifest_key(step), encode_manifest(manifests[-1]))
        before = raw
    return manifests


def _marks(chunk: ChunkRecord) -> tuple[bytes, int]:
    return chunk.checksum, chunk.fingerprint


def _write_pack(store: Store, name: PackKey, chunk: ChunkRecord, raw: bytes) -> tuple[ChunkRecord, PackRef]:
    builder = PackBuilder(name.generation, name.host, name.seq)
    placed = builder.add(chunk, raw)
    data = builder.seal([PackedTensor(f"t{n}", "int32", SHAPE) for n in range(chunk.tensor + 1)])
    key = pack_key(*astuple(name))
    store.put_new(key, bytes(data))
    return placed, PackRef(key, len(data))


def _announced(store: Store, place: tuple[int, int, str], tensors, packs, chunks) -> Manifest:
    """Write the page and the receipt; return the manifest to be."""
    generation, step, host = place
    page = encode_page(chunks)
    seq = 1
    while True:
        try:
            store.put_new(page_key(*place, seq), page)
            break
        except AlreadyExists:
            seq += 1
    ref = page_ref(page_key(*place, seq), page, len(chunks))
    receipt = Receipt(
        "run", generation, step, host, (host,), "digest", packs=tuple(packs), pages=(ref,), proof=str(chunks)
    )
    standing = write_receipt(store, receipt)
    return Manifest(
        run="run",
        step=step,
        generation=generation,
        token="",
        created_utc="2026-11-20T12:00:00+00:00",
        spec_digest="",
        tensors=tuple(tensors),
        packs=standing.packs,
        pages=standing.pages,
        skeleton={},
        meta={},
    )


def _chunks_by_content(store: Store, known: Manifest) -> dict[tuple[bytes, int], tuple[ChunkRecord, PackRef]]:
    """What a keeper remembers of a checkpoint; one whose page is gone already is no help."""
    try:
        pages = [chunks_of_page(known, page, store.read(page.key)[0]) for page in known.pages]
    except NotFound:
        return {}
    return {_marks(chunk): (chunk, known.packs[chunk.pack]) for page in pages for chunk in page}


class Killed(Exception):
    """The actor's process ended in the middle of a request that was never made."""


class Turns:
    """Runs actors as threads, one at a time, from one store request to the next."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._actors: dict[str, threading.Thread] = {}
        self._waiting: set[str] = set()
        self._turn: str | None = None
        self._doomed: set[str] = set()
        self._ended: set[str] = set()
        self.failures: list[BaseException] = []

    def start(self, name: str, act: Callable[[], object]) -> None:
        """Start an actor; it stops before its first request."""
        thread = threading.Thread(target=self._run, args=(act,), name=name, daemon=True)
        self._actors[name] = thread
        thread.start()

    def living(self) -> list[str]:
        """Return the actors that wait for their turn, once every other one has ended."""
        with self._condition:
            self._condition.wait_for(self._is_still, timeout=20)
            return sorted(self._waiting)

    def grant(self, name: str) -> None:
        """Let one actor make the request it waits for."""
        with self._condition:
            self._turn = name
            self._condition.notify_all()
            self._condition.wait_for(self._is_still, timeout=20)

    def kill(self, name: str) -> None:
        """Let an actor end instead of making the request it waits for."""
        self._doomed.add(name)
        self.grant(name)

    def wait(self) -> None:
        """Wait for the turn of this thread. Raises Killed."""
        name = threading.current_thread().name
        if name not in self._actors:
            return
        with self._condition:
            self._waiting.add(name)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._turn == name, timeout=20)
            self._waiting.discard(name)
            self._turn = None
        if name in self._doomed:
            raise Killed(name)

    def _is_still(self) -> bool:
        return self._turn is None and all(
            name in self._waiting or name in self._ended for name in self._actors
        )

    def _run(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (Killed, Conflict, AlreadyExists):
            pass
        except Exception as error:  # noqa: BLE001 - told by the test, in its own thread
            self.failures.append(error)
        finally:
            with self._condition:
                self._ended.add(threading.current_thread().name)
                self._condition.notify_all()


class Stepped:
    """A store of which every request waits for its actor's turn."""

    def __init__(self, store: MemoryStore, turns: Turns) -> None:
        self._store = store
        self._turns = turns

    def __str__(self) -> str:
        return str(self._store)

    def put_new(self, key: str, data: Buffer) -> None:
        self._turns.wait()
        self._store.put_new(key, data)

    def put(self, key: str, data: Buffer) -> None:
        self._turns.wait()
        self._store.put(key, data)

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        self._turns.wait()
        return self._store.read(key, ranges)

    def list(self, prefix: str) -> list[Entry]:
        self._turns.wait()
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        self._turns.wait()
        self._store.delete(key)
