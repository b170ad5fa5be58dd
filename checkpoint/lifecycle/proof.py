"""Whether an object says what was written: a pack by its own index and chunks, a page by its checksum."""

import numpy as np

from checkpoint.errors import Corrupt
from checkpoint.format.codec import checksum, decode
from checkpoint.format.dtypes import itemsize
from checkpoint.format.manifest import PackRef, PageRef
from checkpoint.format.pack import TRAILER_BYTES, PackIndex, decode_pack_index, index_range
from checkpoint.format.records import MAX_CHUNK_BYTES
from checkpoint.lifecycle.sums import Starts
from checkpoint.store.contract import Buffer, ByteRange, Store


def prove_object(ref: PackRef | PageRef, data: Buffer) -> None:
    """Raise Corrupt if the data are not what a manifest names: of its length, and whole by its checksums."""
    num_bytes = memoryview(data).nbytes
    if num_bytes != ref.num_bytes:
        raise Corrupt(f"{ref.key} has {num_bytes} bytes instead of {ref.num_bytes}: it was cut short")
    if isinstance(ref, PackRef):
        prove_pack(data, ref.key)
    elif checksum(data) != ref.checksum:
        raise Corrupt(f"{ref.key} is not the page that its manifest names: it was damaged")


def prove_pack(data: Buffer, key: str) -> PackIndex:
    """Prove a pack by itself: its index, and the content of every chunk; return the index.

    A delta is only decoded here: what it adds up to, no single pack can tell. Raises Corrupt, Unsupported.
    """
    view = memoryview(data).cast("B")
    offset, length = index_range(view[-TRAILER_BYTES:], len(view), key)
    index = decode_pack_index(view[offset : offset + length], len(view), key)
    for chunk in index.chunks:
        tensor = index.tensors[chunk.tensor]
        num_raw_bytes = chunk.box.numel * itemsize(tensor.dtype)
        if num_raw_bytes > MAX_CHUNK_BYTES:
            raise Corrupt(f"a chunk in {key} claims {num_raw_bytes} bytes, more than any chunk has")
        try:
            raw = decode(chunk.codec, view[chunk.offset : chunk.offset + chunk.num_bytes], num_raw_bytes)
        except Corrupt as error:
            raise Corrupt(f"the chunk of {tensor.name!r} at {chunk.offset} of {key}: {error}") from error
        if chunk.base is None and checksum(raw) != chunk.checksum:
            raise Corrupt(f"the checksum of the chunk of {tensor.name!r} at {chunk.offset} of {key} is wrong")
    return index


def read_starts(store: Store, pack: PackRef) -> Starts:
    """Prove a pack's own index; return where its chunks begin, and the index itself.

    Raises NotFound if the pack is missing or cut short, Corrupt, Unsupported.
    """
    index_at = _index_at(store, pack)
    data = store.read(pack.key, [index_at])[0]
    index = decode_pack_index(memoryview(data)[:-TRAILER_BYTES], pack.num_bytes, pack.key)
    return np.unique(np.append(index.chunks.column("offset"), np.uint64(index_at.offset)))


def has_same_index(one: Store, other: Store, pack: PackRef) -> bool:
    """Whether two stores' packs of this key and length list the same chunks, checksums included.

    Reads the ends of both only. Raises NotFound, Corrupt if the first store's pack is not a pack.
    """
    index_at = _index_at(one, pack)
    return bytes(one.read(pack.key, [index_at])[0]) == bytes(other.read(pack.key, [index_at])[0])


def _index_at(store: Store, pack: PackRef) -> ByteRange:
    """Return where a pack's index and trailer lie."""
    num_bytes = min(pack.num_bytes, TRAILER_BYTES)
    trailer = store.read(pack.key, [ByteRange(pack.num_bytes - num_bytes, num_bytes)])[0]
    offset, length = index_range(trailer, pack.num_bytes, pack.key)
    return ByteRange(offset, length + TRAILER_BYTES)
