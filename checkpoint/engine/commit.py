"""Commit without a server: whoever sees all hosts' receipts creates the manifest, and only the first can.

Every byte a manifest names is durable before it: packs, then pages, then receipts, then the manifest.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.contract import Content
from checkpoint.engine.plan import check_cover, group_by_tensor
from checkpoint.engine.receipt import Receipt, read_receipts
from checkpoint.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    FormatError,
    Incomplete,
    Mismatch,
    NoCheckpoint,
    NotFound,
)
from checkpoint.format.codec import checksum
from checkpoint.format.keys import generation_key, manifest_key, page_key
from checkpoint.format.manifest import (
    MAX_CHUNKS_PER_PAGE,
    ChunkRecord,
    Manifest,
    PageRef,
    TensorRecord,
    decode_page,
    encode_manifest,
    encode_page,
    page_ref,
)
from checkpoint.store.contract import Store

_MODULUS = 1 << 64


def write_pages(store: Store, place: tuple[int, int, str], chunks: Sequence[ChunkRecord]) -> list[PageRef]:
    """Write chunk records as index pages of `place` (generation, step, host); return what to call them.

    Numbers that an earlier, dead writer used are left alone.
    """
    pages = []
    seq = 1
    for first in range(0, len(chunks), MAX_CHUNKS_PER_PAGE):
        part = chunks[first : first + MAX_CHUNKS_PER_PAGE]
        data = encode_page(part)
        while True:
            key = page_key(*place, seq)
            seq += 1
            try:
                store.put_new(key, data)
            except AlreadyExists:
                continue
            break
        pages.append(page_ref(key, data, len(part)))
    return pages


def read_pages(store: Store, pages: Sequence[PageRef]) -> list[ChunkRecord]:
    """Read the chunk records of some pages. Raises Corrupt naming the page that is not what was written."""
    chunks: list[ChunkRecord] = []
    for page in pages:
        try:
            data = store.read(page.key)[0]
        except NotFound as error:
            raise Corrupt(f"index page {page.key} is missing: use another checkpoint") from error
        if len(data) != page.num_bytes or checksum(data) != page.checksum:
            raise Corrupt(f"index page {page.key} was damaged or cut short: use another checkpoint")
        part = decode_page(data, page.key)
        if len(part) != page.num_chunks:
            raise Corrupt(f"index page {page.key} lists {len(part)} chunks instead of {page.num_chunks}")
        chunks += part
    return chunks


def fingerprint_sums(chunks: Sequence[ChunkRecord]) -> dict[int, int]:
    """Sum the chunks' fingerprints by tensor number."""
    sums: dict[int, int] = defaultdict(int)
    for chunk in chunks:
        sums[chunk.tensor] = (sums[chunk.tensor] + chunk.fingerprint) % _MODULUS
    return dict(sums)


def proof_of(chunks: Sequence[ChunkRecord]) -> str:
    """Digest the share of each tensor's fingerprint that some chunks hold, however they were cut."""
    return checksum(json.dumps(sorted(fingerprint_sums(chunks).items())).encode()).hex()


def try_commit(store: Store, own: Receipt, created_utc: str) -> Manifest | None:
    """Create the manifest if the receipts of all hosts are there; return it, or None to be asked again.

    Raises Conflict if the step exists with other content, Corrupt if what exists cannot be read, Mismatch if
    the hosts hold different states, Incomplete if the chunks do not cover a tensor or a host gave up.
    """
    existing = _existing(store, own.step)
    if existing is not None and existing.generation == own.generation:
        named = {pack.key for pack in existing.packs}
        if all(pack.key in named for pack in own.packs):
            return existing  # another host was faster
    receipts = read_receipts(store, own.generation, own.step)
    for receipt in receipts.values():
        if receipt.void:
            raise Incomplete(f"host {receipt.host} has no share of step {own.step}: {receipt.void}")
    if any(host not in receipts for host in own.hosts):
        return None
    manifest = _build(store, own, {host: receipts[host] for host in sorted(set(own.hosts))}, created_utc)
    return _create(store, manifest)


def _build(store: Store, own: Receipt, receipts: Mapping[str, Receipt], created_utc: str) -> Manifest:
    lead = receipts[own.hosts[0]]
    content = lead.content
    for receipt in receipts.values():
        if receipt.digest != lead.digest or receipt.hosts != lead.hosts or receipt.run != lead.run:
            raise Mismatch(
                f"hosts {lead.host} and {receipt.host} hold different states at step {own.step}: "
                "every rank has to save the same tensors and the same Python values"
            )
    if content is None or content.digest != lead.digest:
        raise Corrupt(f"receipt {lead.key} lacks the snapshot's content")
    chunks: list[ChunkRecord] = []
    packs = [pack for receipt in receipts.values() for pack in receipt.packs]
    first_pack = 0
    for receipt in receipts.values():
        chunks += [_moved(chunk, first_pack) for chunk in read_pages(store, receipt.pages)]
        first_pack += len(receipt.packs)
    pages = (
        lead.pages if len(receipts) == 1 else write_pages(store, (own.generation, own.step, own.host), chunks)
    )
    meta = dict(lead.meta or {})
    return Manifest(
        run=own.run,
        step=own.step,
        generation=own.generation,
        token=_token(store, own.generation),
        created_utc=created_utc,
        spec_digest=str(meta.get("spec_digest", "")),
        tensors=_tensor_records(content, chunks),
        packs=tuple(packs),
        pages=tuple(pages),
        skeleton=json.loads(content.skeleton),
        meta=meta,
    )


def _moved(chunk: ChunkRecord, first_pack: int) -> ChunkRecord:
    """Number a chunk's pack among all hosts' packs instead of its own host's."""
    return replace(chunk, pack=chunk.pack + first_pack) if first_pack else chunk


def _tensor_records(content: Content, chunks: Sequence[ChunkRecord]) -> tuple[TensorRecord, ...]:
    sums = fingerprint_sums(chunks)
    places = group_by_tensor([chunk.tensor for chunk in chunks])
    records = []
    for number, spec in enumerate(content.tensors):
        check_cover(spec.name, spec.shape, [chunks[place].box for place in places.get(number, [])])
        records.append(TensorRecord(spec.name, spec.dtype, spec.shape, sums.get(number, 0)))
    return tuple(records)


def _create(store: Store, manifest: Manifest) -> Manifest:
    """Create the manifest, or find that an equal one exists; read back what stands."""
    key = manifest_key(manifest.step)
    data = encode_manifest(manifest)
    try:
        store.put_new(key, data)
    except AlreadyExists:
        existing = _existing(store, manifest.step)
        if existing is None or _identity(existing) != _identity(manifest):
            raise Conflict(
                f"{key} exists with other content than this run's step {manifest.step} "
                f"(written in generation {existing.generation if existing else '?'}): "
                "give the run a store of its own, or remove that checkpoint by hand"
            ) from None
        return existing
    if bytes(store.read(key)[0]) != bytes(data):
        raise Conflict(f"{key} does not read back as it was written: this store takes no conditional writes")
    return manifest


def _existing(store: Store, step: int) -> Manifest | None:
    try:
        return Catalog(store).manifest(step)
    except NoCheckpoint:
        return None
    except FormatError as error:
        raise Corrupt(
            f"{manifest_key(step)} stands in the way and cannot be read ({error}): see `holdfast verify`; "
            "resuming the run sets it aside"
        ) from error


def _identity(manifest: Manifest) -> object:
    return manifest.tensors, json.dumps(manifest.skeleton, sort_keys=True)


def _token(store: Store, generation: int) -> str:
    try:
        return str(json.loads(bytes(store.read(generation_key(generation))[0]))["token"])
    except (NotFound, KeyError, TypeError, ValueError):
        return ""  # a stand-alone run claims no generation
