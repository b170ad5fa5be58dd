"""The manifest: what one checkpoint contains, and where; and the pages that list its chunks.

A checkpoint exists once its manifest does.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from checkpoint.errors import Corrupt, FormatError, Unsupported
from checkpoint.format.checks import check_table
from checkpoint.format.codec import Buffer, checksum
from checkpoint.format.json_fields import Fields, dump_json, is_bounded, parse_json
from checkpoint.format.keys import MAX_GENERATION, MAX_STEP, check_key
from checkpoint.format.records import (
    MAX_CHUNKS_PER_PAGE,
    MAX_DIMS,
    MAX_LISTED,
    MAX_MANIFEST_BYTES,
    MAX_PACK_BYTES,
    MAX_PAGE_BYTES,
    ChunkRecord,
    PackRef,
    PageRef,
    TensorRecord,
    dtype_from_json,
    shape_from_json,
)
from checkpoint.format.sealed import VERSION, seal, unseal
from checkpoint.format.table import ChunkTable, decode_table, encode_table
from checkpoint.format.texts import check_text
from checkpoint.format.tree import Json, leaf_names

__all__ = [
    "MAX_CHUNKS_PER_PAGE",
    "ChunkRecord",
    "ChunkTable",
    "Manifest",
    "PackRef",
    "PageRef",
    "TensorRecord",
    "chunks_of_page",
    "decode_manifest",
    "decode_page",
    "encode_manifest",
    "encode_page",
    "encode_pages",
    "metrics_from_json",
    "metrics_to_json",
    "page_ref",
    "pages_with",
]

_HEX64 = r"[0-9a-f]{16}"
_HEX128 = r"[0-9a-f]{32}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint contains: tensors, the packs and pages that hold them, and the skeleton of the state.

    `token` tells who wrote it, `spec_digest` of which run's specification. `data_cursor` is where the run
    stood in its data, as plain JSON; `metrics` are what policies may judge the checkpoint by; `meta` is the
    saver's own JSON.
    """

    version: int = VERSION
    run: str
    step: int
    generation: int
    token: str
    created_utc: str
    spec_digest: str
    tensors: tuple[TensorRecord, ...]
    packs: tuple[PackRef, ...]
    pages: tuple[PageRef, ...]
    skeleton: Json
    data_cursor: Json = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, Any]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's bytes. Raises FormatError for what `decode_manifest` would not take back."""
    _check_readable(manifest)
    body = {
        "run": manifest.run,
        "step": manifest.step,
        "generation": manifest.generation,
        "token": manifest.token,
        "created_utc": manifest.created_utc,
        "spec_digest": manifest.spec_digest,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": t.shape, "fingerprint": f"{t.fingerprint:016x}"}
            for t in manifest.tensors
        ],
        "packs": [{"key": p.key, "num_bytes": p.num_bytes} for p in manifest.packs],
        "pages": [
            {
                "key": p.key,
                "num_bytes": p.num_bytes,
                "num_chunks": p.num_chunks,
                "first_tensor": p.first_tensor,
                "last_tensor": p.last_tensor,
                "xxh3_128": p.checksum.hex(),
            }
            for p in manifest.pages
        ],
        "skeleton": manifest.skeleton,
        "data_cursor": manifest.data_cursor,
        "metrics": metrics_to_json(manifest.metrics),
        "meta": dict(manifest.meta),
    }
    text = dump_json(body, f"the manifest of step {manifest.step}")
    data = seal("manifest", text)
    if len(data) > MAX_MANIFEST_BYTES or not is_bounded(text):
        raise FormatError(
            f"the manifest of step {manifest.step} would have {len(data)} bytes of plain data, or more "
            "values than one is read with: make large data of the state, its cursor or its meta tensors"
        )
    return data


def _check_readable(manifest: Manifest) -> None:
    for what in ("run", "token", "created_utc", "spec_digest"):
        check_text(getattr(manifest, what), f"the manifest's {what}")
    for one in manifest.tensors:
        check_text(one.name, "the name of a tensor")
        if len(one.shape) > MAX_DIMS:
            raise FormatError(
                f"the tensor {one.name!r} has {len(one.shape)} dims, and {MAX_DIMS} are the most"
            )


def decode_manifest(data: Buffer, where: str = "a manifest") -> Manifest:
    """Read a manifest that may be hostile; `where` (its key) is named in errors.

    Raises Corrupt if it is not as it was written or says what cannot be, Unsupported for a later version.
    """
    if memoryview(data).nbytes > MAX_MANIFEST_BYTES:
        raise Corrupt(f"{where} is larger than any manifest: {memoryview(data).nbytes} bytes")
    try:
        body = unseal("manifest", data, where)
    except Unsupported:
        if _is_ours_but_for_its_version(data):
            raise Corrupt(f"the version in {where} is damaged: the rest is of version {VERSION}") from None
        raise
    fields = Fields(parse_json(body, where), where)
    manifest = Manifest(
        run=fields.text("run"),
        step=fields.count("step", MAX_STEP),
        generation=fields.count("generation", MAX_GENERATION),
        token=fields.text("token"),
        created_utc=fields.text("created_utc"),
        spec_digest=fields.text("spec_digest"),
        tensors=tuple(_tensor(node, where) for node in fields.items("tensors", MAX_LISTED)),
        packs=tuple(_pack(node, where) for node in fields.items("packs", MAX_LISTED)),
        pages=tuple(_page(node, where) for node in fields.items("pages", MAX_LISTED)),
        skeleton=fields.json("skeleton"),
        data_cursor=fields.json("data_cursor"),
        metrics=metrics_from_json(fields.json("metrics"), where),
        meta=_meta(fields.json("meta"), where),
    )
    fields.end()
    _check_names(manifest, where)
    return manifest


def _is_ours_but_for_its_version(data: Buffer) -> bool:
    """Whether a manifest of version 0, whose checksum does not cover the version, is one of version 1."""
    head, newline, body = bytes(data).partition(b"\n")
    mended = head.replace(b'"version": 0', b'"version": 1')
    if mended == head:
        return False
    try:
        decode_manifest(mended + newline + body)
    except FormatError:
        return False
    return True


def metrics_to_json(metrics: Mapping[str, float]) -> Json:
    """Return metrics as plain JSON, in which what is not finite is the text "nan", "inf" or "-inf"."""
    return {
        name: value if math.isfinite(value) else repr(value)
        for name, value in ((name, float(value)) for name, value in metrics.items())
    }


def metrics_from_json(node: Json, where: str) -> dict[str, float]:
    """Read metrics that may be hostile. Raises Corrupt."""
    if not isinstance(node, dict):
        raise Corrupt(f"the metrics in {where} are not a JSON object")
    for name, value in node.items():
        if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
            raise Corrupt(f"the metric {name[:80]!a} in {where} is no number")
    try:
        return {name: float(value) for name, value in node.items()}  # type: ignore[arg-type]  # checked above
    except OverflowError as error:
        raise Corrupt(f"a metric in {where} is no number: {error}") from None


def encode_page(chunks: Sequence[ChunkRecord]) -> bytes:
    """Return the bytes of an index page, which lists chunks in the order of their tensors.

    Raises FormatError for more than MAX_CHUNKS_PER_PAGE chunks and bases.
    """
    return seal("page", encode_table(ChunkTable.of(chunks).sorted_by_tensor()))


def encode_pages(chunks: Sequence[ChunkRecord]) -> Iterator[tuple[bytes, int]]:
    """Yield as many pages as the chunks need, in the order of the tensors, and how many chunks each lists."""
    table = ChunkTable.of(chunks).sorted_by_tensor()
    num_rows = np.cumsum(np.bincount(table.owners(), minlength=len(table)))
    first = 0
    while first < len(table):
        before = int(num_rows[first - 1]) if first else 0
        last = int(np.searchsorted(num_rows, before + MAX_CHUNKS_PER_PAGE, side="right"))
        yield encode_page(table[first:last]), last - first
        first = last


def decode_page(data: Buffer, where: str = "a page") -> ChunkTable:
    """Read a page that may be hostile; `where` (its key) is named in errors. Raises Corrupt, Unsupported.

    Whether the chunks lie within tensors and packs, only their manifest can tell: see `chunks_of_page`.
    """
    if memoryview(data).nbytes > MAX_PAGE_BYTES:
        raise Corrupt(f"{where} is larger than any page: {memoryview(data).nbytes} bytes")
    table = decode_table(unseal("page", data, where), where)
    if (np.diff(table.tensor.astype(np.int64)) < 0).any():
        raise Corrupt(f"{where} does not list its chunks in the order of their tensors")
    return table


def page_ref(key: str, data: Buffer, num_chunks: int) -> PageRef:
    """Return what a manifest says about a page of these bytes. Raises Corrupt if they are no page."""
    first, last = _tensor_range(decode_page(data, key))
    return PageRef(key, memoryview(data).nbytes, num_chunks, checksum(data), first, last)


def pages_with(manifest: Manifest, tensors: Collection[int]) -> tuple[PageRef, ...]:
    """Return the pages that can list chunks of these tensors (places in the manifest's list)."""
    wanted = sorted(tensors)
    return tuple(
        page
        for page in manifest.pages
        if bisect_left(wanted, page.first_tensor) < bisect_right(wanted, page.last_tensor)
    )


def chunks_of_page(manifest: Manifest, ref: PageRef, data: Buffer) -> ChunkTable:
    """Read one of a manifest's pages, and hold it against the manifest.

    Every box that is returned lies in its tensor, every range in its pack, and no chunk is larger, raw or
    stored, than a chunk may be. Raises Corrupt naming the page.
    """
    if memoryview(data).nbytes != ref.num_bytes or checksum(data) != ref.checksum:
        raise Corrupt(f"{ref.key} is not the page that the manifest of step {manifest.step} names: damaged")
    table = decode_page(data, ref.key)
    if len(table) != ref.num_chunks or _tensor_range(table) != (ref.first_tensor, ref.last_tensor):
        raise Corrupt(
            f"{ref.key} lists {len(table)} chunks of the tensors {_tensor_range(table)} "
            f"instead of {ref.num_chunks} of {(ref.first_tensor, ref.last_tensor)}"
        )
    check_table(table, manifest.tensors, manifest.packs, ref.key)
    return table


def _tensor_range(table: ChunkTable) -> tuple[int, int]:
    return (int(table.tensor[0]), int(table.tensor[-1])) if len(table) else (0, 0)


def _pack(node: Json, where: str) -> PackRef:
    """Read a pack's key and size."""
    fields = Fields(node, f"a pack in {where}")
    pack = PackRef(check_key(fields.json("key"), where), fields.count("num_bytes", MAX_PACK_BYTES))
    fields.end()
    return pack


def _tensor(node: Json, where: str) -> TensorRecord:
    fields = Fields(node, f"a tensor in {where}")
    name = fields.text("name")
    dtype = dtype_from_json(fields, where)
    shape = shape_from_json(fields, dtype, where)
    tensor = TensorRecord(name, dtype, shape, int(fields.text("fingerprint", _HEX64), 16))
    fields.end()
    return tensor


def _page(node: Json, where: str) -> PageRef:
    fields = Fields(node, f"a page in {where}")
    page = PageRef(
        check_key(fields.json("key"), where),
        fields.count("num_bytes", MAX_PAGE_BYTES),
        fields.count("num_chunks", MAX_CHUNKS_PER_PAGE),
        bytes.fromhex(fields.text("xxh3_128", _HEX128)),
        fields.count("first_tensor", MAX_LISTED),
        fields.count("last_tensor", MAX_LISTED),
    )
    fields.end()
    return page


def _meta(node: Json, where: str) -> dict[str, Json]:
    if not isinstance(node, dict):
        raise Corrupt(f"the field 'meta' of {where} is not a JSON object")
    return node


def _check_names(manifest: Manifest, where: str) -> None:
    """Every name stands for one thing, and the skeleton refers to nothing else."""
    tensors = {tensor.name for tensor in manifest.tensors}
    objects = [*(pack.key for pack in manifest.packs), *(page.key for page in manifest.pages)]
    if len(tensors) != len(manifest.tensors) or len(set(objects)) != len(objects):
        raise Corrupt(f"{where} lists a tensor, a pack or a page twice")
    for page in manifest.pages:
        if not page.first_tensor <= page.last_tensor < len(manifest.tensors) and page.num_chunks:
            raise Corrupt(f"the page {page.key} in {where} lists chunks of tensors that there are not")
    for name in leaf_names(manifest.skeleton):
        if name not in tensors:
            raise Corrupt(f"the skeleton in {where} refers to the tensor {name[:80]!a}, which is not listed")
