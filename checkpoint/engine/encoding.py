"""The work on a batch of chunks: digested, found among what is known, or encoded. Moves nothing, waits for
nothing but the bases of deltas; several batches are worked on at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from checkpoint.engine.known import Known
from checkpoint.engine.ledger import ShareEntry, Writing
from checkpoint.engine.predecessors import Predecessors
from checkpoint.format.codec import Buffer, Codec, checksum, encode, xor_bytes
from checkpoint.format.fingerprint import fingerprint_many
from checkpoint.format.records import ChunkRecord

_WORTH = 0.9  # of what the chunk took when it was last stored in full: a larger delta is not worth its chain


@dataclass(frozen=True, slots=True)
class Job:
    """Chunks of one share, and the memory of the arena that they lie in.

    What is `known` need not be stored again; `bases` (if deltas are wanted) are what others may differ from.
    If the snapshot `is_held`, its raw bytes stay as they are.
    """

    share: ShareEntry
    chunks: tuple[int, ...]
    memory: memoryview
    is_held: bool
    known: Known | None = None
    bases: Predecessors | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as it is `held` in the arena, and as it is to be `stored`.

    Without `data` it is stored already: `stored` says where, counting in the packs of what is known. With it
    the chunk's place is still to be found; its base, if it has one, counts in those packs as well. The data
    may lie in the arena.
    """

    held: ChunkRecord
    stored: ChunkRecord | None = None
    data: Buffer | None = None
    is_in_arena: bool = False


def digest(job: Job) -> list[Encoded]:
    """Digest a batch that is held in the arena and not to be stored."""
    return [Encoded(held) for held, _ in _digested(job)]


def work_on(job: Job) -> list[Encoded]:
    """Digest a batch, and encode what is not known."""
    done = []
    for held, raw in _digested(job):
        found = job.known and job.known.find(held.checksum, held.fingerprint, len(raw))
        if found:
            done.append(Encoded(held, _moved_to(held, found)))
        else:
            done.append(_encoded(job, held, raw))
    return done


def _digested(job: Job) -> Iterator[tuple[ChunkRecord, memoryview]]:
    plan = job.share.plan
    tensors = plan.content.tensors
    slots = [plan.slots[index] for index in job.chunks]
    firsts = [job.share.region.offset + slot.offset for slot in slots]
    raws = [job.memory[first : first + slot.num_bytes] for first, slot in zip(firsts, slots, strict=True)]
    specs = [tensors[slot.tensor] for slot in slots]
    regions = [
        (raw, spec.dtype, spec.shape, slot.box) for raw, spec, slot in zip(raws, specs, slots, strict=True)
    ]
    marks = fingerprint_many(regions)
    for slot, first, raw, mark in zip(slots, firsts, raws, marks, strict=True):
        yield (
            ChunkRecord(slot.tensor, slot.box, Codec.RAW, 0, first, len(raw), checksum(raw), mark),
            raw,
        )


def _encoded(job: Job, held: ChunkRecord, raw: memoryview) -> Encoded:
    handling, spec = job.share.plan.handling, job.share.plan.content.tensors[held.tensor]
    base = job.bases and job.bases.find(spec.name, held, handling.delta_chain)
    if base:
        codec, data = encode(handling.codec, xor_bytes(raw, base.raw), handling.level, dtype=spec.dtype)
        if codec is not Codec.RAW and len(data) <= _WORTH * _root(base.chunk).num_bytes:
            below = _moved_to(held, base.chunk)
            return _put_by(job, Encoded(held, replace(held, codec=codec, base=below), data), raw)
    codec, data = encode(handling.codec, raw, handling.level, dtype=spec.dtype)
    return _put_by(job, Encoded(held, replace(held, codec=codec), data), raw)


def _put_by(job: Job, done: Encoded, raw: memoryview) -> Encoded:
    """Put what a chunk was encoded to in its place in the arena, if it is not needed there as it was."""
    if done.data is None or done.data is raw:
        return replace(done, is_in_arena=True)
    if job.is_held or job.share.writing is not Writing.SEALED:  # the trainer still compares what it captured
        return done
    place = raw[: len(done.data)]
    place[:] = done.data
    return replace(done, data=place, is_in_arena=True)


def _root(chunk: ChunkRecord) -> ChunkRecord:
    return chunk if chunk.base is None else _root(chunk.base)


def _moved_to(held: ChunkRecord, found: ChunkRecord) -> ChunkRecord:
    """Return a chunk that was found, as one of the tensor and box it was sought for; so its bases."""
    below = None if found.base is None else _moved_to(held, found.base)
    return replace(found, tensor=held.tensor, box=held.box, base=below)
