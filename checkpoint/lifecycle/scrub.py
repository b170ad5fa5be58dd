"""The scrub: reads checkpoints back as a restore would, and names all that is not as it was written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import check_cover, group_by_tensor
from checkpoint.errors import Corrupt, FormatError, Incomplete, NoCheckpoint, NotFound
from checkpoint.format.codec import checksum, decode
from checkpoint.format.dtypes import itemsize
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.format.keys import manifest_key
from checkpoint.format.manifest import ChunkRecord, Manifest, chunks_of_page
from checkpoint.store.contract import Buffer, ByteRange, Store

_BATCH_BYTES = 32 << 20  # stored bytes held at a time
_MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class Bad:
    """Something that is not as it was written: a manifest, a page, a tensor or one of its chunks."""

    step: int
    item: str
    why: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read back, and what is wrong with it: `num_bad` items, the first thousand of them listed."""

    steps: tuple[int, ...]
    num_tensors: int
    num_chunks: int
    num_bytes: int
    num_bad: int
    bad: tuple[Bad, ...]

    @property
    def is_sound(self) -> bool:
        """Whether everything is as it was written."""
        return self.num_bad == 0

    @property
    def bad_steps(self) -> tuple[int, ...]:
        """The steps that have something wrong, of those listed."""
        return tuple(sorted({one.step for one in self.bad}))


def verify(store: Store, step: int | None = None) -> VerifyReport:
    """Read back every chunk of one step's checkpoint, or of all: checksums, fingerprints, exact coverage.

    Bad content is listed, never raised; memory stays within some 40 MiB beside the index of a checkpoint.
    Raises NoCheckpoint if there is nothing to verify, StoreUnavailable if the store cannot be read.
    """
    catalog = Catalog(store)
    steps = catalog.steps() if step is None else [step]
    if not steps or (step is not None and step not in catalog.steps()):
        what = "no checkpoint at all" if step is None else f"no checkpoint of step {step}"
        raise NoCheckpoint(f"{store} holds {what}: is the URL right, and has a checkpoint become durable?")
    tally = _Tally()
    for one in steps:
        try:
            manifest = catalog.manifest(one)
        except (FormatError, NoCheckpoint) as error:
            tally.note(one, manifest_key(one), error)
            continue
        _verify_checkpoint(store, manifest, tally)
    return VerifyReport(
        tuple(steps), tally.num_tensors, tally.num_chunks, tally.num_bytes, tally.num_bad, tuple(tally.bad)
    )


@dataclass(slots=True)
class _Tally:
    """The counts of a scrub under way."""

    num_tensors: int = 0
    num_chunks: int = 0
    num_bytes: int = 0
    num_bad: int = 0
    bad: list[Bad] = field(default_factory=list)

    def note(self, step: int, item: str, why: object) -> None:
        self.num_bad += 1
        if len(self.bad) < _MAX_LISTED:
            self.bad.append(Bad(step, item, str(why)))


def _verify_checkpoint(store: Store, manifest: Manifest, tally: _Tally) -> None:
    chunks = _read_index(store, manifest, tally)
    sums = [0] * len(manifest.tensors)
    for batch in _batches(chunks):
        key = manifest.packs[batch[0].pack].key
        for chunk, stored in _read(store, key, batch):
            tally.num_chunks += 1
            tally.num_bytes += chunk.num_bytes
            try:
                found = _proved(manifest, chunk, stored)
            except FormatError as error:
                name = manifest.tensors[chunk.tensor].name
                tally.note(manifest.step, f"{name} (bytes {chunk.offset}+{chunk.num_bytes} of {key})", error)
                continue
            sums[chunk.tensor] = (sums[chunk.tensor] + found) % MODULUS
    places = group_by_tensor([chunk.tensor for chunk in chunks])
    for number, tensor in enumerate(manifest.tensors):
        tally.num_tensors += 1
        try:
            check_cover(tensor.name, tensor.shape, [chunks[place].box for place in places.get(number, [])])
            if sums[number] != tensor.fingerprint:
                raise Corrupt(f"its fingerprint is {sums[number]:016x} instead of {tensor.fingerprint:016x}")
        except (Incomplete, Corrupt) as error:
            tally.note(manifest.step, tensor.name, error)


def _read_index(store: Store, manifest: Manifest, tally: _Tally) -> list[ChunkRecord]:
    chunks: list[ChunkRecord] = []
    for page in manifest.pages:
        try:
            chunks += chunks_of_page(manifest, page, store.read(page.key)[0])
        except (FormatError, NotFound) as error:
            tally.note(manifest.step, page.key, error)
    return chunks


def _batches(chunks: Sequence[ChunkRecord]) -> Iterator[list[ChunkRecord]]:
    """Yield runs of chunks of one pack, in its order, of a bounded size."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.pack, chunk.offset))
    for _, of_pack in groupby(ordered, key=lambda chunk: chunk.pack):
        batch: list[ChunkRecord] = []
        num_bytes = 0
        for chunk in of_pack:
            if batch and num_bytes + chunk.num_bytes > _BATCH_BYTES:
                yield batch
                batch, num_bytes = [], 0
            batch.append(chunk)
            num_bytes += chunk.num_bytes
        yield batch


def _read(
    store: Store, key: str, batch: Sequence[ChunkRecord]
) -> Iterator[tuple[ChunkRecord, Buffer | NotFound]]:
    """Read chunks of a pack at once; if not all are there, one by one, to know which."""
    ranges = [ByteRange(chunk.offset, chunk.num_bytes) for chunk in batch]
    try:
        yield from zip(batch, store.read(key, ranges), strict=True)
    except NotFound:
        for chunk, wanted in zip(batch, ranges, strict=True):
            try:
                yield chunk, store.read(key, [wanted])[0]
            except NotFound as error:
                yield chunk, error


def _proved(manifest: Manifest, chunk: ChunkRecord, stored: Buffer | NotFound) -> int:
    """Return the fingerprint of a chunk's content. Raises Corrupt if it is not what was written."""
    if isinstance(stored, NotFound):
        raise Corrupt(str(stored)) from stored
    tensor = manifest.tensors[chunk.tensor]
    raw = decode(chunk.codec, stored, chunk.box.numel * itemsize(tensor.dtype))
    if checksum(raw) != chunk.checksum:
        raise Corrupt("its checksum does not agree")
    found = fingerprint(raw, tensor.dtype, tensor.shape, chunk.box)
    if found != chunk.fingerprint:
        raise Corrupt("its fingerprint does not agree: it is the content of another place")
    return found
