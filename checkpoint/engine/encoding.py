"""The work on a batch of chunks: digested, found among what is known, or encoded. Moves nothing, waits for
nothing but the bases of deltas; several batches are worked on at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from checkpoint.engine.known import Known
from checkpoint.engine.ledger import ShareEntry, Writing
from checkpoint.engine.predecessors import Predecessors
from checkpoint.format.blocks import digest_many
from checkpoint.format.codec import Buffer, Codec, checksum, encode, xor_bytes
from checkpoint.format.records import ChunkRecord

_WORTH = 0.9  # of what the chunk took when it was last stored in full: a larger delta is not worth its chain


@dataclass(frozen=True, slots=True)
class Job:
    """Chunks of one share, and the memory of the arena that they lie in.

    What is `known` need not be stored again; against `bases`, if deltas are wanted, others may be stored.
    If the snapshot `is_held`, its raw bytes stay as they are.
    """

    share: ShareEntry
    chunks: tuple[int, ...]
    memory: memoryview
    is_held: bool
    known: Known | None = None
    bases: Predecessors | None = None


class Encoded(NamedTuple):
    """A chunk as it is to be stored.

    Without `data` it is stored already, and the record says where, counting in the packs of what is known.
    With it the chunk's place is still to be found; its base, if it has one, counts in those packs as well.
    The data may lie in the arena; if not, they keep `num_pinned_bytes` of other memory.
    """

    chunk: ChunkRecord
    data: Buffer | None = None
    is_in_arena: bool = False
    num_pinned_bytes: int = 0


def digest(share: ShareEntry, chunks: Sequence[int], memory: memoryview) -> list[ChunkRecord]:
    """Return what a share's chunks are as they lie in the arena: raw; their offsets count in its memory."""
    plan, first = share.plan, share.region.offset
    slots = [plan.slots[index] for index in chunks]
    raws = [memory[first + slot.offset : first + slot.offset + slot.num_bytes] for slot in slots]
    specs = [plan.content.tensors[slot.tensor] for slot in slots]
    marks = digest_many(
        [(raw, spec.dtype, spec.shape, slot.box) for raw, spec, slot in zip(raws, specs, slots, strict=True)]
    )
    return [
        ChunkRecord(  # in its fields' order, for thousands of small chunks
            slot.tensor,
            slot.box,
            Codec.RAW,
            0,
            first + slot.offset,
            slot.num_bytes,
            checksum(raw),
            mark,
            None,
            sums,
        )
        for slot, raw, (mark, sums) in zip(slots, raws, marks, strict=True)
    ]


def digest_once(share: ShareEntry, chunks: Sequence[int], memory: memoryview) -> list[ChunkRecord]:
    """Do the same for a snapshot that is held, but for chunks that were digested before."""
    new = [chunk for chunk in chunks if chunk not in share.digests]
    share.digests.update(zip(new, digest(share, new, memory), strict=True))
    return [share.digests[chunk] for chunk in chunks]


def work_on(job: Job) -> list[Encoded]:
    """Digest a batch, and encode what is not known."""
    done, known = [], job.known
    for held in (digest_once if job.is_held else digest)(job.share, job.chunks, job.memory):
        raw = job.memory[held.offset : held.offset + held.num_bytes]
        found = None if known is None else known.find(held.checksum, held.fingerprint, len(raw))
        if found:
            done.append(Encoded(_moved_to(held, found)))
        else:
            done.append(_encoded(job, held, raw))
    return done


def _encoded(job: Job, held: ChunkRecord, raw: memoryview) -> Encoded:
    handling, spec = job.share.plan.handling, job.share.plan.content.tensors[held.tensor]
    if handling.codec is Codec.RAW:
        return Encoded(held, raw, is_in_arena=True)
    base = None if job.bases is None else job.bases.find(spec.name, held, handling.delta_chain)
    if base is not None:
        codec, data = encode(handling.codec, xor_bytes(raw, base.raw), handling.level, dtype=spec.dtype)
        if codec is not Codec.RAW and len(data) <= _WORTH * _root(base.chunk).num_bytes:
            below = _moved_to(held, base.chunk)
            return _put_by(job, replace(held, codec=codec, base=below), data, raw)
    codec, data = encode(handling.codec, raw, handling.level, dtype=spec.dtype)
    if codec is Codec.RAW:
        return Encoded(held, raw, is_in_arena=True)
    return _put_by(job, replace(held, codec=codec), data, raw)


def _put_by(job: Job, chunk: ChunkRecord, data: Buffer, raw: memoryview) -> Encoded:
    """Put what a chunk was encoded to in its place in the arena, if it is not needed there as it was.

    It is if the snapshot is held, or if the trainer still compares what it captured. Then the data stay where
    a codec made them, in memory for as much as the raw chunk has; much less than that is copied, so that this
    memory is free again.
    """
    if not job.is_held and job.share.writing is Writing.SEALED:
        place = raw[: len(data)]
        place[:] = data
        return Encoded(chunk, place, is_in_arena=True)
    if len(data) > len(raw) // 2:
        return Encoded(chunk, data, num_pinned_bytes=len(raw))
    return Encoded(chunk, bytes(memoryview(data)), num_pinned_bytes=len(data))


def _root(chunk: ChunkRecord) -> ChunkRecord:
    return chunk if chunk.base is None else _root(chunk.base)


def _moved_to(held: ChunkRecord, found: ChunkRecord) -> ChunkRecord:
    """Return a chunk that was found, as one of the tensor and box it was sought for; so its bases."""
    below = None if found.base is None else _moved_to(held, found.base)
    return replace(found, tensor=held.tensor, box=held.box, base=below)
