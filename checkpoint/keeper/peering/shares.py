"""One host's share of a snapshot as a value that can travel: what it is, then its bytes. Moves nothing.

8 bytes magic, u64 length of the head, the head (sealed JSON, then manifest and pages), zeros up to 64
the body: the local ranks' regions, one after the other
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.errors import Corrupt, Mismatch
from checkpoint.format.codec import Buffer
from checkpoint.format.json_fields import dump_json, parse_json
from checkpoint.format.manifest import Manifest, decode_manifest, decode_page, encode_manifest, encode_pages
from checkpoint.format.sealed import seal, unseal
from checkpoint.format.table import ChunkTable

PREFIX = struct.Struct("<8sQ")
_MAGIC = b"HFshare\0"
_ALIGNMENT = 64
_MAX_HEAD_BYTES = 1 << 33
_LENGTH = struct.Struct("<Q")
_MODULUS = 1 << 64


@dataclass(frozen=True, slots=True)
class Share:
    """What one host has of a snapshot. Chunks lie at their `offset` in its body; `hosts[r]` is rank r's.

    The manifest's fingerprints are those of this share alone.
    """

    host: str
    hosts: tuple[str, ...]
    digest: str
    manifest: Manifest
    chunks: ChunkTable

    @property
    def id(self) -> tuple[int, int]:
        """Generation and step."""
        return self.manifest.generation, self.manifest.step


def share_of(entry: SnapshotEntry) -> Share:
    """Describe what this host holds of a snapshot. Its chunks have to be digested."""
    if entry.image is None:
        raise Mismatch(f"step {entry.step} is not digested yet")
    chunks = ChunkTable.of(entry.image.chunks)
    shares = [entry.shares[rank] for rank in entry.local_ranks]
    begins = np.cumsum([0, *(one.plan.num_bytes for one in shares)])[:-1]
    moves = [int(begin) - one.region.offset for begin, one in zip(begins, shares, strict=True)]
    rows = chunks.rows.copy()
    counts = [len(one.plan.slots) for one in shares]
    rows["offset"] = (rows["offset"].astype(np.int64) + np.repeat(moves, counts)).astype(np.uint64)
    moved = ChunkTable(rows, chunks.dims, len(chunks))
    return Share(entry.host, entry.hosts, entry.content.digest, entry.image.manifest, moved)


def body_of(entry: SnapshotEntry, memory: memoryview) -> list[memoryview]:
    """Return the bytes of a host's share as they lie in its arena."""
    shares = [entry.shares[rank] for rank in entry.local_ranks]
    return [memory[one.region.offset : one.region.offset + one.plan.num_bytes] for one in shares]


def encode_head(share: Share) -> bytes:
    """Return what goes before a share's body."""
    manifest = encode_manifest(share.manifest)
    pages = [page for page, _ in encode_pages(share.chunks)]
    about = {
        "host": share.host,
        "hosts": share.hosts,
        "digest": share.digest,
        "parts": [len(part) for part in (manifest, *pages)],
    }
    said = seal("share", dump_json(about, f"a share of step {share.manifest.step}"))
    parts = b"".join((_LENGTH.pack(len(said)), said, manifest, *pages))
    head = PREFIX.pack(_MAGIC, len(parts)) + parts
    return head + bytes(-len(head) % _ALIGNMENT)


def head_bytes(prefix: Buffer) -> int:
    """Return how long a head is, told by its first bytes. Raises Corrupt if they are none."""
    magic, num_bytes = PREFIX.unpack_from(prefix)
    if magic != _MAGIC or num_bytes > _MAX_HEAD_BYTES:
        raise Corrupt("what a peer has in place of a share of a snapshot is something else")
    total: int = PREFIX.size + num_bytes
    return total + -total % _ALIGNMENT


def decode_head(head: Buffer, where: str) -> Share:
    """Read a head. Raises Corrupt if it is not as it was written; `where` it was read is named."""
    view = memoryview(head).cast("B")
    try:
        (num_bytes,) = _LENGTH.unpack_from(view, PREFIX.size)
        first = PREFIX.size + _LENGTH.size
        about: Any = parse_json(unseal("share", view[first : first + num_bytes], where), where)
        manifest, *pages = _parts(view[first + num_bytes :], about["parts"], where)
        chunks = ChunkTable.concat([decode_page(page, where) for page in pages])
        said = decode_manifest(manifest, where)
        return Share(about["host"], tuple(about["hosts"]), about["digest"], said, chunks)
    except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
        raise Corrupt(f"{where} is no share of ours: {error!r}") from error


def merge(shares: Sequence[Share]) -> tuple[Manifest, ChunkTable]:
    """Put the shares of all hosts of one snapshot together; a chunk's pack is then its host's number here.

    Raises Corrupt if they are not of one snapshot.
    """
    lead = next((one for one in shares if one.host == one.hosts[0]), None)
    if lead is None or {one.host for one in shares} != set(lead.hosts):
        raise Corrupt("the shares at hand are not those of all hosts of a snapshot")
    for one in shares:
        same = (one.id, one.hosts, one.digest, one.manifest.run, one.manifest.skeleton)
        if same != (lead.id, lead.hosts, lead.digest, lead.manifest.run, lead.manifest.skeleton):
            raise Corrupt(f"hosts {lead.host} and {one.host} hold different snapshots of step {lead.id[1]}")
    tensors = []
    for records in zip(*(one.manifest.tensors for one in shares), strict=True):
        total = sum(record.fingerprint for record in records) % _MODULUS
        tensors.append(replace(records[0], fingerprint=total))
    tables = [one.chunks.with_packs([number]) for number, one in enumerate(shares)]
    return replace(lead.manifest, tensors=tuple(tensors)), ChunkTable.concat(tables)


def _parts(view: memoryview, lengths: Sequence[int], where: str) -> list[memoryview]:
    """Cut what follows into the manifest and the pages; each of them proves itself."""
    ends = list(accumulate(lengths))
    if not ends or ends[-1] > view.nbytes:
        raise Corrupt(f"{where} was cut short")
    return [view[end - length : end] for length, end in zip(lengths, ends, strict=True)]
