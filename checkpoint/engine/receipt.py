"""Receipts: a host's word that its share of a snapshot is durable, or that it never will be."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from typing import Any

from checkpoint.engine.contract import Content
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import AlreadyExists, Conflict, Corrupt
from checkpoint.format.json_fields import dump_json, parse_json
from checkpoint.format.keys import check_key, page_key, pages_prefix, parse_page_key
from checkpoint.format.manifest import PackRef, PageRef
from checkpoint.format.sealed import seal, unseal
from checkpoint.store.contract import Buffer, Store

RECEIPT_SEQ = 0  # among a host's index objects of a step the receipt is number 0; pages begin at 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one host has made durable of a snapshot: its packs, and the pages that say what lies in them.

    `digest` is that of the snapshot's content, which all hosts must agree on; `content` and `meta` themselves
    come from the host of rank 0 only, if there are others to read them. `proof` digests the host's share of
    every tensor's fingerprint: a second attempt at the same receipt is the same snapshot exactly if it is
    equal. Those of `packs` whose keys are in `borrowed` belong to an earlier checkpoint. `void` tells why
    there is nothing, if so.
    """

    run: str
    generation: int
    step: int
    host: str
    hosts: tuple[str, ...]
    digest: str
    packs: tuple[PackRef, ...] = ()
    pages: tuple[PageRef, ...] = ()
    borrowed: tuple[str, ...] = ()
    proof: str = ""
    content: Content | None = None
    meta: Mapping[str, Any] | None = None
    void: str = ""

    @property
    def key(self) -> str:
        """The receipt's key in the store."""
        return page_key(self.generation, self.step, self.host, RECEIPT_SEQ)


def receipt_of(entry: SnapshotEntry) -> Receipt:
    """Return the receipt of a host's share of a snapshot, before anything of it was written."""
    first = entry.shares.get(min(entry.local_ranks))
    return Receipt(
        run=entry.run,
        generation=entry.generation,
        step=entry.step,
        host=entry.host,
        hosts=entry.hosts,
        digest=entry.content.digest,
        content=entry.content,
        meta=None if first is None else first.plan.meta,
    )


def now_utc() -> str:
    """Return the time as a manifest records it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_receipt(store: Store, receipt: Receipt) -> Receipt:
    """Write a receipt, once; return the one that stands.

    A keeper that died after writing it left the same word behind: then that one stands, and so do its packs.
    Raises Conflict when another snapshot was receipted under this generation, step and host.
    """
    try:
        store.put_new(receipt.key, encode_receipt(receipt))
    except AlreadyExists:
        standing = read_receipt(store, receipt.key)
        if (standing.digest, standing.hosts, standing.proof) == (
            receipt.digest,
            receipt.hosts,
            receipt.proof,
        ):
            return standing
        raise Conflict(
            f"{receipt.key} receipts another snapshot of step {receipt.step}"
            + (f" ({standing.void})" if standing.void else "")
            + ": generation numbers must not be used twice, claim a new one"
        ) from None
    return receipt


def void_receipt(store: Store, receipt: Receipt) -> None:
    """Tell the other hosts that this one has nothing to give, unless it has receipted already."""
    try:
        store.put_new(receipt.key, encode_receipt(receipt))
    except AlreadyExists:
        return


def read_receipts(store: Store, generation: int, step: int) -> dict[str, Receipt]:
    """Read the receipts of a snapshot that are there so far, by host."""
    found = {}
    for entry in store.list(pages_prefix(generation, step)):
        parsed = parse_page_key(entry.key)
        if parsed is not None and parsed.seq == RECEIPT_SEQ:
            found[parsed.host] = read_receipt(store, entry.key)
    return found


def read_receipt(store: Store, key: str) -> Receipt:
    """Read one receipt. Raises Corrupt if it is not what was written."""
    return decode_receipt(store.read(key)[0], key)


def encode_receipt(receipt: Receipt) -> bytes:
    """Write a receipt as JSON under its own checksum. Raises FormatError if meta is not plain JSON."""
    fields = {field.name: getattr(receipt, field.name) for field in dataclass_fields(receipt)}
    fields["packs"] = [asdict(pack) for pack in receipt.packs]
    fields["pages"] = [{**asdict(page), "checksum": page.checksum.hex()} for page in receipt.pages]
    fields["content"] = None if receipt.content is None else _content_to_json(receipt.content)
    return seal("receipt", dump_json(fields, f"the meta of step {receipt.step}"))


def decode_receipt(data: Buffer, key: str) -> Receipt:
    """Read a receipt. Raises Corrupt naming its key."""
    # Its own checksum vouches for it, so a field of another type was written by another program.
    fields: Any = parse_json(unseal("receipt", data, key), key)
    try:
        packs = [PackRef(check_key(pack["key"], key), pack["num_bytes"]) for pack in fields.pop("packs")]
        pages = [_page(page, key) for page in fields.pop("pages")]
        hosts = tuple(fields.pop("hosts"))
        borrowed = tuple(check_key(key, key) for key in fields.pop("borrowed"))
        content = fields.pop("content")
        receipt = Receipt(
            **fields,
            hosts=hosts,
            packs=tuple(packs),
            pages=tuple(pages),
            borrowed=borrowed,
            content=None if content is None else _content(content),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"receipt {key} is not one of ours: {error!r}") from error
    if receipt.key != key:
        raise Corrupt(f"receipt {key} says that it is {receipt.key}")
    return receipt


def _page(fields: dict[str, Any], where: str) -> PageRef:
    key = check_key(fields["key"], where)
    return PageRef(**{**fields, "key": key, "checksum": bytes.fromhex(fields["checksum"])})


def _content_to_json(content: Content) -> dict[str, Any]:
    tensors = [[spec.name, spec.dtype, spec.shape] for spec in content.tensors]
    return {"tensors": tensors, "skeleton": content.skeleton, "digest": content.digest}


def _content(fields: dict[str, Any]) -> Content:
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in fields["tensors"])
    return Content(specs, fields["skeleton"], fields["digest"])
