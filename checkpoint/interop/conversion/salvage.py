"""What an attempt that was cut off has left: its packs, which tell by themselves what is in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import FormatError, NotFound
from checkpoint.format.box import Box
from checkpoint.format.codec import checksum, decode
from checkpoint.format.dtypes import itemsize
from checkpoint.format.keys import PACKS, pages_prefix, parse_pack_key, parse_page_key
from checkpoint.format.manifest import Manifest, PackRef
from checkpoint.format.pack import TRAILER_BYTES, decode_pack_index, index_range
from checkpoint.format.records import ChunkRecord
from checkpoint.store.contract import ByteRange, Store

GENERATION = 0  # a conversion claims none: it has no world, and the manifest decides


@dataclass(frozen=True, slots=True)
class Salvage:
    """Packs of an earlier attempt that are as good as new, and their chunks; the next free pack number."""

    packs: tuple[PackRef, ...]
    chunks: Mapping[tuple[int, Box], ChunkRecord]
    next_seq: int


def salvage(store: Store, host: str, specs: Sequence[TensorSpec], wanted: set[tuple[int, Box]]) -> Salvage:
    """Find the chunks that an attempt of the same name (so of the same source and target) has stored.

    A pack is used whole or not at all: if all of its chunks are wanted, no pack before it has them, and each
    is still what its checksum says. To read and unpack them is cheaper than to make them anew.
    """
    packs: list[PackRef] = []
    chunks: dict[tuple[int, Box], ChunkRecord] = {}
    next_seq = 0
    for entry in store.list(f"{PACKS}{GENERATION:06d}-{host}-"):
        key = parse_pack_key(entry.key)
        if key is None:
            continue
        next_seq = max(next_seq, key.seq + 1)
        found = _read_index(store, entry.key, entry.num_bytes, specs)
        places = {(chunk.tensor, chunk.box) for chunk in found}
        is_fit = found and places <= wanted and len(places) == len(found) and not places & chunks.keys()
        if is_fit and all(_is_whole(store, entry.key, one, specs) for one in found):
            chunks |= {(one.tensor, one.box): replace(one, pack=len(packs)) for one in found}
            packs.append(PackRef(entry.key, entry.num_bytes))
    return Salvage(tuple(packs), chunks, next_seq)


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


def discard_attempt(store: Store, host: str) -> None:
    """Delete the packs of an attempt whose proof failed, so that the next one begins anew."""
    for entry in store.list(f"{PACKS}{GENERATION:06d}-{host}-"):
        store.delete(entry.key)


def _is_whole(store: Store, key: str, chunk: ChunkRecord, specs: Sequence[TensorSpec]) -> bool:
    """Whether a stored chunk unpacks to what it is said to be."""
    num_bytes = chunk.box.numel * itemsize(specs[chunk.tensor].dtype)
    try:
        data = store.read(key, [ByteRange(chunk.offset, chunk.num_bytes)])[0]
        return checksum(decode(chunk.codec, data, num_bytes)) == chunk.checksum
    except (FormatError, NotFound):
        return False


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
