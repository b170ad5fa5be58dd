"""A new checkpoint, streamed: batches are read and encoded by a few threads, packed in order, committed last.

The commit is the one that trainings use: packs, pages, a receipt, the manifest. Whatever ends a conversion
early leaves finished packs behind; the next attempt of the same conversion goes on from them.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from checkpoint.engine.commit import proof_of, try_commit, write_pages
from checkpoint.engine.contract import Content
from checkpoint.engine.pipeline import Crew
from checkpoint.engine.plan import Piece, TensorSpec
from checkpoint.engine.receipt import Receipt, encode_receipt, now_utc
from checkpoint.errors import AlreadyExists, Conflict, Mismatch, StoreUnavailable
from checkpoint.format.blocks import BLOCK_BYTES, SUM_BYTES, digest_many
from checkpoint.format.codec import Buffer, checksum, encode
from checkpoint.format.keys import pack_key
from checkpoint.format.manifest import Manifest, PackRef
from checkpoint.format.pack import ALIGNMENT, PackBuilder
from checkpoint.format.records import MAX_CHUNKS_PER_PAGE, ChunkRecord
from checkpoint.format.table import ChunkTable
from checkpoint.format.tree import Json
from checkpoint.interop.conversion.batches import Cut, batches_of, cuts_of, wishes_of
from checkpoint.interop.conversion.contract import (
    ConversionSettings,
    GlobalTensors,
    Listener,
    Progress,
    unheard,
)
from checkpoint.interop.conversion.finding import check_own
from checkpoint.interop.conversion.salvage import (
    GENERATION,
    Salvage,
    discard_attempt,
    prove_stored,
    salvage,
    sweep_attempt,
)
from checkpoint.store.contract import Store

_HOST_DIGITS = 24
# Of a pack's index: a row, and what a tensor's line has besides name, dtype and shape. And a pack's two ends.
_MOST_ROW_BYTES, _MOST_ENDS_BYTES = 640, 1024


@dataclass(frozen=True, slots=True)
class Draft:
    """The checkpoint that is to be: its place, its tensors, the state around them, the boxes of its chunks.

    `origin` identifies the content of what is converted, and how: an attempt resumes another exactly if
    origin and draft are the same. `meta` is the manifest's, with "spec_digest", "data_cursor" and "metrics".
    `widths` are the bytes of an element of each tensor as it is read whole before it is cast, if any is.
    """

    run: str
    step: int
    tensors: tuple[TensorSpec, ...]
    skeleton: Json
    meta: Mapping[str, Any]
    pieces: tuple[Piece, ...]
    origin: str
    widths: tuple[int, ...] = ()

    @property
    def cuts(self) -> list[Cut]:
        """The chunks to make, in order."""
        return cuts_of(self.tensors, self.pieces, self.widths)

    def host(self, settings: ConversionSettings) -> str:
        """Return the name under which an attempt writes its objects."""
        specs = [[spec.name, spec.dtype, spec.shape] for spec in self.tensors]
        pieces = [[one.tensor, one.box.start, one.box.size] for one in self.pieces]
        kind = [self.origin, self.run, self.step, int(settings.codec), settings.level, GENERATION]
        told = json.dumps([kind, specs, pieces, self.skeleton, self.meta], sort_keys=True)
        return f"c{checksum(told.encode()).hex()[:_HOST_DIGITS]}"


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a draft: its manifest, and what was found done, in raw bytes."""

    manifest: Manifest
    num_chunks: int
    num_bytes: int
    num_resumed_bytes: int
    stored_bytes: int


def most_stored_bytes(draft: Draft, settings: ConversionSettings) -> int:
    """Return what a draft's packs have at most: every chunk raw, what lies around it, its index."""
    cuts, most = draft.cuts, 0
    for cut in cuts:
        spec = draft.tensors[cut.tensor]
        sums = 2 * SUM_BYTES * (1 + cut.num_bytes // BLOCK_BYTES)
        described = len(json.dumps([spec.name, spec.dtype, spec.shape]))
        most += cut.num_bytes + ALIGNMENT + sums + described + _MOST_ROW_BYTES
    return most + _MOST_ENDS_BYTES * (1 + most // settings.pack_bytes)


Check = Callable[[Mapping[str, int]], None]


def write_checkpoint(
    store: Store,
    draft: Draft,
    contents: GlobalTensors,
    *,
    settings: ConversionSettings,
    check: Check,
    listener: Listener = unheard,
) -> Written:
    """Write a checkpoint of `contents`, whose tensors are the draft's.

    Just before the manifest is created, `check` is told the fingerprint of every tensor that was written, by
    name, and raises what is wrong with them. Raises Conflict if the step exists with other content by then,
    AlreadyExists if with the same from another conversion.
    """
    host = draft.host(settings)
    cuts = draft.cuts
    wanted = {(cut.tensor, cut.box) for cut in cuts}
    found = salvage(store, host, draft.tensors, wanted, num_threads=settings.num_workers)
    todo = [cut for cut in cuts if (cut.tensor, cut.box) not in found.chunks]
    num_bytes = sum(cut.num_bytes for cut in cuts)
    packing = _Packing(store, host, draft, found, settings.pack_bytes)
    num_done = num_resumed = num_bytes - sum(cut.num_bytes for cut in todo)
    listener(Progress("converting", num_done, num_bytes))
    try:
        for batch, encoded in _encoded(draft, contents, todo, settings):
            for chunk, data in encoded:
                packing.add(chunk, data)
            num_done += sum(cut.num_bytes for cut in batch)
            listener(Progress("converting", num_done, num_bytes))
        packing.finish()
        table = ChunkTable.of(packing.chunks)
        sums = table.fingerprint_sums()
        check({spec.name: sums.get(number, 0) for number, spec in enumerate(draft.tensors)})
    except Mismatch:
        packing.close()
        discard_attempt(store, host, draft.step)
        raise
    finally:
        packing.close()
    check_own(store)  # an export may have been put here meanwhile
    manifest = _commit(store, host, draft, packing.packs, table)
    if not {pack.key for pack in packing.packs} <= {pack.key for pack in manifest.packs}:
        discard_attempt(store, host, draft.step)
        raise AlreadyExists(
            f"{store} has got another checkpoint of step {draft.step} meanwhile, of the same content: "
            "another conversion was faster. Give a store of its own, nothing is overwritten"
        )
    sweep_attempt(store, host, manifest)
    stored = sum(pack.num_bytes for pack in manifest.packs)
    return Written(manifest, len(cuts), num_bytes, num_resumed, stored)


Encoded = list[tuple[ChunkRecord, Buffer]]


def _encoded(
    draft: Draft, contents: GlobalTensors, cuts: Sequence[Cut], settings: ConversionSettings
) -> Iterator[tuple[list[Cut], Encoded]]:
    """Yield what batches of chunks are encoded to, in order; a few are worked on at once."""
    crew = Crew("convert", settings.num_workers)
    ahead: deque[tuple[list[Cut], Future[Encoded]]] = deque()
    try:
        for batch in batches_of(cuts, settings.batch_bytes):
            ahead.append((batch, crew.submit(_encode_batch, draft, contents, batch, settings)))
            if len(ahead) > settings.num_workers:
                done, future = ahead.popleft()
                yield done, future.result()
        while ahead:
            done, future = ahead.popleft()
            yield done, future.result()
    finally:
        crew.close()


def _encode_batch(
    draft: Draft, contents: GlobalTensors, batch: list[Cut], settings: ConversionSettings
) -> Encoded:
    arrays = contents.read(wishes_of(batch))
    specs = [draft.tensors[cut.tensor] for cut in batch]
    raws = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
    marks = digest_many(
        [(raw, spec.dtype, spec.shape, cut.box) for raw, spec, cut in zip(raws, specs, batch, strict=True)]
    )
    encoded: Encoded = []
    for raw, spec, cut, (mark, sums) in zip(raws, specs, batch, marks, strict=True):
        codec, data = encode(settings.codec, raw, settings.level, dtype=spec.dtype)
        chunk = ChunkRecord(cut.tensor, cut.box, codec, 0, 0, 0, checksum(raw), mark, sums=sums)
        encoded.append((chunk, data))
    return encoded


@dataclass(slots=True)
class _Packing:
    """Packs under way: one is filled while the one before is written, and read back to be proved.

    `packs` are those that are durable.
    """

    store: Store
    host: str
    draft: Draft
    found: Salvage
    pack_bytes: int
    packs: list[PackRef] = field(init=False)
    chunks: list[ChunkRecord] = field(init=False)
    _builder: PackBuilder | None = field(default=None, init=False)
    _filled: list[ChunkRecord] = field(default_factory=list, init=False)
    _seq: int = field(init=False)
    _crew: Crew = field(init=False)
    _flying: "Future[None] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.packs, self.chunks = list(self.found.packs), list(self.found.chunks.values())
        self._seq = self.found.next_seq
        self._crew = Crew("write", 1)

    def add(self, chunk: ChunkRecord, data: Buffer) -> None:
        """Append a chunk; hand the pack over once it is full."""
        if self._builder is None:
            self._builder = PackBuilder(GENERATION, self.host, self._seq)
        self._filled.append(self._builder.add(replace(chunk, pack=len(self.packs)), data))
        if self._builder.num_bytes >= self.pack_bytes or self._builder.num_chunks >= MAX_CHUNKS_PER_PAGE:
            self._hand_over()

    def finish(self) -> None:
        """Wait until everything is durable."""
        self._hand_over()
        self._wait()

    def close(self) -> None:
        """End the thread that writes, after the pack in hand."""
        self._crew.close()

    def _hand_over(self) -> None:
        if self._builder is None:
            return
        self._wait()
        parts = self._builder.seal_parts(self.draft.tensors)
        ref = PackRef(pack_key(GENERATION, self.host, self._seq), self._builder.num_bytes)
        self.packs.append(ref)
        self._seq += 1
        self._builder = None
        self._flying = self._crew.submit(self._write, ref.key, parts, self._filled)
        self.chunks += self._filled
        self._filled = []

    def _write(self, key: str, parts: list[Buffer], chunks: list[ChunkRecord]) -> None:
        try:
            self.store.put_new(key, parts)
        except AlreadyExists as error:
            raise Conflict(
                f"{key} is there already: is the same conversion running twice? End one"
            ) from error
        prove_stored(self.store, key, chunks, self.draft.tensors)

    def _wait(self) -> None:
        if self._flying is not None:
            self._flying.result()
            self._flying = None


def _commit(store: Store, host: str, draft: Draft, packs: Sequence[PackRef], table: ChunkTable) -> Manifest:
    """Write pages and receipt, and create the manifest."""
    text = json.dumps(draft.skeleton, separators=(",", ":"), allow_nan=False)
    specs = json.dumps([[spec.name, spec.dtype, spec.shape] for spec in draft.tensors])
    digest = checksum(f"{specs}\n{text}".encode()).hex()
    receipt = Receipt(
        run=draft.run,
        generation=GENERATION,
        step=draft.step,
        host=host,
        hosts=(host,),
        digest=digest,
        packs=tuple(packs),
        proof=proof_of(table),
        content=Content(draft.tensors, text, digest),
        meta=draft.meta,
    )
    pages = write_pages(store, (GENERATION, draft.step, host), table)
    # Announced like borrowed packs, for a prune to spare: a conversion may take longer than a prune's grace.
    own = replace(receipt, pages=tuple(pages), borrowed=tuple(pack.key for pack in packs))
    # In place of an earlier attempt's, whose packs may be gone or damaged by now; nobody else has its name.
    store.put(own.key, encode_receipt(own))
    manifest = try_commit(store, own, table, now_utc())
    if manifest is None:
        raise StoreUnavailable(f"{store} is just being pruned: run the same conversion again to finish it")
    return manifest
