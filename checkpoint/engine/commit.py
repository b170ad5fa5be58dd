"""Commit without a server: whoever sees all hosts' receipts creates the manifest, and only the first can.

Every byte a manifest names is durable before it: packs, then pages, then receipts, then the manifest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import check_chunks
from checkpoint.engine.receipt import Receipt, read_receipts
from checkpoint.engine.sweeps import look_up
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
    ChunkRecord,
    Manifest,
    PackRef,
    PageRef,
    TensorRecord,
    decode_page,
    encode_manifest,
    encode_pages,
    metrics_from_json,
    page_ref,
)
from checkpoint.format.table import ChunkTable
from checkpoint.store.contract import Store


def write_pages(
    store: Store, place: tuple[int, int, str], chunks: Sequence[ChunkRecord], *, life: str = ""
) -> list[PageRef]:
    """Write chunk records as index pages of `place` (generation, step, host); return what to call them.

    Numbers that this life of the host used before, or an earlier one without a name, are left alone.
    """
    pages = []
    seq = 1
    for data, num_chunks in encode_pages(chunks):
        while True:
            key = page_key(*place, seq, life)
            seq += 1
            try:
                store.put_new(key, data)
            except AlreadyExists:
                continue
            break
        pages.append(page_ref(key, data, num_chunks))
    return pages


def read_pages(store: Store, pages: Sequence[PageRef]) -> ChunkTable:
    """Read the chunk records of some pages. Raises Corrupt naming the page that is not what was written."""
    tables = []
    for page in pages:
        try:
            data = store.read(page.key)[0]
        except NotFound as error:
            raise Corrupt(f"index page {page.key} is missing: use another checkpoint") from error
        if len(data) != page.num_bytes or checksum(data) != page.checksum:
            raise Corrupt(f"index page {page.key} was damaged or cut short: use another checkpoint")
        table = decode_page(data, page.key)
        if len(table) != page.num_chunks:
            raise Corrupt(f"index page {page.key} lists {len(table)} chunks instead of {page.num_chunks}")
        tables.append(table)
    return ChunkTable.concat(tables)


def proof_of(chunks: ChunkTable) -> str:
    """Digest the share of each tensor's fingerprint that some chunks hold, however they were cut."""
    return checksum(json.dumps(sorted(chunks.fingerprint_sums().items())).encode()).hex()


def try_commit(
    store: Store, own: Receipt, chunks: ChunkTable, created_utc: str, *, life: str = ""
) -> Manifest | None:
    """Create the manifest if the receipts of all hosts are there; return it, or None to be asked again.

    None also while a prune is about to delete what an earlier checkpoint shares with this one: it finds the
    receipts and spares it, or it is gone when asked again. `chunks` is what this host's own
    pages list, `life` names new ones.

    Raises Conflict if the step exists with other content, Corrupt if what exists cannot be read, Mismatch if
    the hosts hold different states, Incomplete if the chunks do not cover a tensor, a host gave up, or what
    an earlier checkpoint was to share is gone.
    """
    existing = _existing(store, own.step)
    if existing is not None and existing.generation == own.generation:
        named = {pack.key for pack in existing.packs}
        if all(pack.key in named for pack in own.packs):
            return existing  # another host was faster
    receipts = {own.host: own}
    if set(own.hosts) != {own.host}:
        receipts = {**read_receipts(store, own.generation, own.step), **receipts}
    for receipt in receipts.values():
        if receipt.void:
            raise Incomplete(f"host {receipt.host} has no share of step {own.step}: {receipt.void}")
    if any(host not in receipts for host in own.hosts):
        return None
    receipts = {host: receipts[host] for host in sorted(set(own.hosts))}
    tables = [chunks if receipt is own else read_pages(store, receipt.pages) for receipt in receipts.values()]
    manifest = _merge(store, own, receipts, tables, created_utc, life=life)
    if not _is_firm(store, receipts.values()):
        return None
    return _create(store, manifest)


def describe(receipt: Receipt, chunks: ChunkTable, packs: Sequence[PackRef], created_utc: str) -> Manifest:
    """Return the manifest of what a receipt with content speaks of, without pages and token."""
    content = receipt.content
    if content is None or content.digest != receipt.digest:
        raise Corrupt(f"receipt {receipt.key} lacks the snapshot's content")
    sums = chunks.fingerprint_sums()
    meta = dict(receipt.meta or {})
    return Manifest(
        run=receipt.run,
        step=receipt.step,
        generation=receipt.generation,
        token="",
        created_utc=created_utc,
        spec_digest=str(meta.get("spec_digest", "")),
        tensors=tuple(
            TensorRecord(spec.name, spec.dtype, spec.shape, sums.get(number, 0))
            for number, spec in enumerate(content.tensors)
        ),
        packs=tuple(packs),
        pages=(),
        skeleton=json.loads(content.skeleton),
        data_cursor=meta.pop("data_cursor", None),
        metrics=metrics_from_json(meta.pop("metrics", {}), receipt.key),
        meta=meta,
    )


def _merge(
    store: Store,
    own: Receipt,
    receipts: Mapping[str, Receipt],
    tables: Sequence[ChunkTable],
    created_utc: str,
    *,
    life: str,
) -> Manifest:
    """Put the hosts' shares together; several hosts' pages are written anew, with common pack numbers."""
    lead = receipts[own.hosts[0]]
    for receipt in receipts.values():
        if receipt.digest != lead.digest or receipt.hosts != lead.hosts or receipt.run != lead.run:
            raise Mismatch(
                f"hosts {lead.host} and {receipt.host} hold different states at step {own.step}: "
                "every rank has to save the same tensors and the same Python values"
            )
    packs = list(dict.fromkeys(pack for receipt in receipts.values() for pack in receipt.packs))
    numbers = {pack: number for number, pack in enumerate(packs)}
    chunks = ChunkTable.concat(
        [
            table.with_packs([numbers[pack] for pack in receipt.packs])
            for receipt, table in zip(receipts.values(), tables, strict=True)
        ]
    )
    manifest = describe(lead, chunks, packs, created_utc)
    check_chunks(manifest.tensors, chunks)
    place = (own.generation, own.step, own.host)
    pages = lead.pages if len(receipts) == 1 else write_pages(store, place, chunks, life=life)
    return replace(manifest, pages=tuple(pages), token=_token(store, own.generation))


def _is_firm(store: Store, receipts: Iterable[Receipt]) -> bool:
    """Whether the packs of earlier checkpoints, which the receipts announce, stay; a prune may be at them.

    Raises Incomplete if one of them is gone.
    """
    borrowed = {
        (pack.key, pack.num_bytes)
        for receipt in receipts
        for pack in receipt.packs
        if pack.key in receipt.borrowed
    }
    if not borrowed:
        return True
    footing = look_up(store, borrowed, [receipt.key for receipt in receipts])
    if footing.gone or footing.changed:
        raise Incomplete(
            f"packs of an earlier checkpoint, which this one was to share, cannot be used: {footing}. Was it "
            "pruned with less grace than a save takes? The next checkpoint shares nothing with it"
        )
    return footing.is_firm


def _create(store: Store, manifest: Manifest) -> Manifest:
    """Create the manifest, or find that an equal one exists; read back what stands."""
    key = manifest_key(manifest.step)
    data = encode_manifest(manifest)
    try:
        store.put_new(key, data)
    except AlreadyExists:
        existing = _existing(store, manifest.step)
        if existing is None:
            raise Conflict(
                f"{key} is taken and holds no manifest (a directory, perhaps) in {store}: remove it"
            ) from None
        if _identity(existing) != _identity(manifest):
            raise Conflict(
                f"{key} exists with other content than this run's step {manifest.step} "
                f"(written in generation {existing.generation}): "
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
