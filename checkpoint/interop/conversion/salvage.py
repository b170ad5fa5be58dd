"""What an attempt that was cut off has left: its packs, which tell by themselves what is in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import FormatError, Mismatch, NotFound
from checkpoint.format.blocks import digest_many
from checkpoint.format.box import Box
from checkpoint.format.codec import Buffer, checksum, decode
from checkpoint.format.dtypes import itemsize
from checkpoint.format.keys import PACKS, pages_prefix, parse_pack_key, parse_page_key
from checkpoint.format.manifest import Manifest, PackRef
from checkpoint.format.pack import TRAILER_BYTES, decode_pack_index, index_range
from checkpoint.format.records import ChunkRecord
from checkpoint.store.contract import ByteRange, Entry, Store

_REQUEST_BYTES = 4 << 20
GENERATION = 0  # a conversion claims none: it has no world, and the manifest decides


@dataclass(frozen=True, slots=True)
class Salvage:
    """Packs of an earlier attempt that are as good as new, and their chunks; the next free pack number."""

    packs: tuple[PackRef, ...]
    chunks: Mapping[tuple[int, Box], ChunkRecord]
    next_seq: int


def salvage(
    store: Store,
    host: str,
    specs: Sequence[TensorSpec],
    wanted: set[tuple[int, Box]],
    *,
    num_threads: int,
) -> Salvage:
    """Find the chunks that an attempt of the same name (so of the same source and target) has stored.

    A pack is used whole or not at all: if all of its chunks are wanted, no pack before it has them, and each
    is still what its checksum and its fingerprint say. To read and unpack them is cheaper than to make them
    anew.
    """
    entries = [
        (entry, key.seq)
        for entry in store.list(f"{PACKS}{GENERATION:06d}-{host}-")
        if (key := parse_pack_key(entry.key)) is not None
    ]
    packs: list[PackRef] = []
    chunks: dict[tuple[int, Box], ChunkRecord] = {}
    proved = fan_out(lambda one: _proved(store, one[0], specs, wanted), entries, num_threads)
    for (entry, _), found in zip(entries, proved, strict=True):
        if found and not found.keys() & chunks.keys():
            chunks |= {place: replace(one, pack=len(packs)) for place, one in found.items()}
            packs.append(PackRef(entry.key, entry.num_bytes))
    return Salvage(tuple(packs), chunks, max((seq + 1 for _, seq in entries), default=0))


def sweep_attempt(store: Store, host: str, manifest: Manifest) -> None:
    """Delete what attempts of this name left and the manifest does not name: nobody else uses the name."""
    named = {pack.key for pack in manifest.packs} | {page.key for page in manifest.pages}
    for entry in store.list(f"{PACKS}{GENERATION:06d}-{host}-"):
        if entry.key not in named:
            store.delete(entry.key)
    for entry in store.list(f"{pages_prefix(GENERATION, manifest.step)}{host}-"):
        key = parse_page_key(entry.key)
        if key is not None and key.seq and entry.key not in named:
            store.delete(entry.key)


def discard_attempt(store: Store, host: str, step: int) -> None:
    """Delete all of an attempt that came too late, or whose proof failed, so that the next begins anew."""
    for prefix in (f"{pages_prefix(GENERATION, step)}{host}-", f"{PACKS}{GENERATION:06d}-{host}-"):
        for entry in store.list(prefix):
            store.delete(entry.key)


def _proved(
    store: Store, entry: Entry, specs: Sequence[TensorSpec], wanted: set[tuple[int, Box]]
) -> dict[tuple[int, Box], ChunkRecord]:
    """Return the chunks of a pack, by place; none if one is not wanted, or not what it is said to be."""
    found = _read_index(store, entry.key, entry.num_bytes, specs)
    places = {(chunk.tensor, chunk.box): chunk for chunk in found}
    if not places.keys() <= wanted or len(places) < len(found):
        return {}
    return places if all(_are_whole(store, entry.key, some, specs) for some in _together(found)) else {}


def prove_stored(store: Store, key: str, chunks: Sequence[ChunkRecord], specs: Sequence[TensorSpec]) -> None:
    """Read chunks of a pack back, and see that they hold what was to be stored. Raises Mismatch."""
    for some in _together(chunks):
        if not _are_whole(store, key, some, specs):
            names = sorted({specs[chunk.tensor].name for chunk in some})
            raise Mismatch(
                f"what was written to {key} of {store} is not left there: read back, the content of "
                f"{names[:5]} differs; nothing was committed"
            )


def _together(chunks: Sequence[ChunkRecord]) -> Iterator[list[ChunkRecord]]:
    """Yield chunks to read with one request: a few MiB of them, or one."""
    some: list[ChunkRecord] = []
    num_bytes = 0
    for chunk in chunks:
        if some and num_bytes + chunk.num_bytes > _REQUEST_BYTES:
            yield some
            some, num_bytes = [], 0
        some.append(chunk)
        num_bytes += chunk.num_bytes
    if some:
        yield some


def _are_whole(store: Store, key: str, chunks: Sequence[ChunkRecord], specs: Sequence[TensorSpec]) -> bool:
    """Whether stored chunks unpack to what they are said to be, by checksum and by fingerprint."""
    try:
        read = store.read(key, [ByteRange(one.offset, one.num_bytes) for one in chunks])
        return all(_is_whole(one, data, specs[one.tensor]) for one, data in zip(chunks, read, strict=True))
    except (FormatError, NotFound):
        return False


def _is_whole(chunk: ChunkRecord, data: Buffer, spec: TensorSpec) -> bool:
    raw = memoryview(decode(chunk.codec, data, chunk.box.numel * itemsize(spec.dtype)))
    mark, _ = digest_many([(raw, spec.dtype, spec.shape, chunk.box)])[0]
    return checksum(raw) == chunk.checksum and mark == chunk.fingerprint


def _read_index(store: Store, key: str, num_bytes: int, specs: Sequence[TensorSpec]) -> list[ChunkRecord]:
    """Return what a pack lists; nothing if it cannot be read, or speaks of other tensors."""
    try:
        trailer = store.read(key, [ByteRange(num_bytes - TRAILER_BYTES, TRAILER_BYTES)])[0]
        offset, length = index_range(trailer, num_bytes, key)
        index = decode_pack_index(store.read(key, [ByteRange(offset, length)])[0], num_bytes, key)
    except (FormatError, NotFound):
        return []
    for number, one in index.tensors.items():
        if number >= len(specs) or (one.name, one.dtype, one.shape) != (
            specs[number].name,
            specs[number].dtype,
            specs[number].shape,
        ):
            return []
    return list(index.chunks)
