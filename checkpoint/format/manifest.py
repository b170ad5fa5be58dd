"""The manifest: what one checkpoint contains, and where; and the pages that list its chunks.

A checkpoint exists once its manifest does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.format.codec import Buffer, checksum
from checkpoint.format.json_fields import Fields, dump_json, parse_json
from checkpoint.format.keys import MAX_GENERATION, MAX_STEP, check_key
from checkpoint.format.records import (
    MAX_CHUNKS_PER_PAGE,
    MAX_LISTED,
    MAX_MANIFEST_BYTES,
    MAX_PACK_BYTES,
    MAX_PAGE_BYTES,
    ChunkRecord,
    PackRef,
    PageRef,
    TensorRecord,
    check_chunk,
    dtype_from_json,
    shape_from_json,
)
from checkpoint.format.sealed import VERSION, seal, unseal
from checkpoint.format.table import decode_table, encode_table
from checkpoint.format.tree import Json, leaf_names

__all__ = [
    "MAX_CHUNKS_PER_PAGE",
    "ChunkRecord",
    "Manifest",
    "PackRef",
    "PageRef",
    "TensorRecord",
    "chunks_of_page",
    "decode_manifest",
    "decode_page",
    "encode_manifest",
    "encode_page",
    "page_ref",
]

_HEX64 = r"[0-9a-f]{16}"
_HEX128 = r"[0-9a-f]{32}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint contains: tensors, the packs and pages that hold them, and the skeleton of the state.

    `token` tells who wrote it, `spec_digest` of which run's specification; `meta` is the saver's own JSON.
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
    meta: Mapping[str, Any]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's bytes. Raises FormatError if meta is not plain JSON."""
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
            {"key": p.key, "num_bytes": p.num_bytes, "num_chunks": p.num_chunks, "xxh3_128": p.checksum.hex()}
            for p in manifest.pages
        ],
        "skeleton": manifest.skeleton,
        "meta": dict(manifest.meta),
    }
    return seal("manifest", dump_json(body, f"the manifest of step {manifest.step}"))


def decode_manifest(data: Buffer, where: str = "a manifest") -> Manifest:
    """Read a manifest that may be hostile; `where` (its key) is named in errors.

    Raises Corrupt if it is not as it was written or says what cannot be, Unsupported for a later version.
    """
    if memoryview(data).nbytes > MAX_MANIFEST_BYTES:
        raise Corrupt(f"{where} is larger than any manifest: {memoryview(data).nbytes} bytes")
    fields = Fields(parse_json(unseal("manifest", data, where), where), where)
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
        meta=_meta(fields.json("meta"), where),
    )
    fields.end()
    _check_names(manifest, where)
    return manifest


def encode_page(chunks: Sequence[ChunkRecord]) -> bytes:
    """Return the bytes of an index page. Raises FormatError for more than MAX_CHUNKS_PER_PAGE chunks."""
    return seal("page", encode_table(chunks))


def decode_page(data: Buffer, where: str = "a page") -> tuple[ChunkRecord, ...]:
    """Read a page that may be hostile; `where` (its key) is named in errors. Raises Corrupt, Unsupported.

    Whether the chunks lie within tensors and packs, only their manifest can tell: see `chunks_of_page`.
    """
    if memoryview(data).nbytes > MAX_PAGE_BYTES:
        raise Corrupt(f"{where} is larger than any page: {memoryview(data).nbytes} bytes")
    return decode_table(unseal("page", data, where), where)


def page_ref(key: str, data: Buffer, num_chunks: int) -> PageRef:
    """Return what a manifest says about a page of these bytes."""
    return PageRef(key, memoryview(data).nbytes, num_chunks, checksum(data))


def chunks_of_page(manifest: Manifest, ref: PageRef, data: Buffer) -> tuple[ChunkRecord, ...]:
    """Read one of a manifest's pages, and hold it against the manifest.

    Every box that is returned lies in its tensor, every range in its pack, and no chunk is larger, raw or
    stored, than a chunk may be. Raises Corrupt naming the page.
    """
    if memoryview(data).nbytes != ref.num_bytes or checksum(data) != ref.checksum:
        raise Corrupt(f"{ref.key} is not the page that the manifest of step {manifest.step} names: damaged")
    chunks = decode_page(data, ref.key)
    if len(chunks) != ref.num_chunks:
        raise Corrupt(f"{ref.key} lists {len(chunks)} chunks instead of {ref.num_chunks}")
    for chunk in chunks:
        check_chunk(chunk, manifest.tensors, ref.key)
        if chunk.pack >= len(manifest.packs):
            raise Corrupt(
                f"a chunk in {ref.key} lies in the pack number {chunk.pack} of {len(manifest.packs)}"
            )
        pack = manifest.packs[chunk.pack]
        if chunk.offset + chunk.num_bytes > pack.num_bytes:
            raise Corrupt(f"a chunk in {ref.key} reaches beyond the end of {pack.key}")
    return chunks


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
    for name in leaf_names(manifest.skeleton):
        if name not in tensors:
            raise Corrupt(f"the skeleton in {where} refers to the tensor {name[:80]!r}, which is not listed")
