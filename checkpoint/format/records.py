"""What a manifest, its pages and its packs are made of, and the bounds that every one of them keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.errors import Corrupt
from checkpoint.format.codec import Codec
from checkpoint.format.dtypes import DTYPES
from checkpoint.format.json_fields import Fields
from checkpoint.format.layout import Box

MAX_CHUNK_BYTES = 4 << 20  # of raw content
MAX_CHUNKS_PER_PAGE = 65536
MAX_PAGE_BYTES = 64 << 20
MAX_PACK_BYTES = 1 << 40
MAX_MANIFEST_BYTES = 256 << 20
MAX_LISTED = 1 << 22  # tensors, packs or pages of one checkpoint
MAX_TENSOR_BYTES = 1 << 60
MAX_DIMS = 32


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """A stored box: `num_bytes` at `offset` of a pack. Checksum and fingerprint are of the raw bytes.

    `tensor` and `pack` are places in the lists of tensors and packs that the record is read with.
    """

    tensor: int
    box: Box
    codec: Codec
    pack: int
    offset: int
    num_bytes: int
    checksum: bytes
    fingerprint: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the checkpoint; its fingerprint is the sum of those of its chunks, modulo 2^64."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fingerprint: int

    @property
    def num_bytes(self) -> int:
        """How many bytes its elements take."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class PackRef:
    """A pack object."""

    key: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PageRef:
    """An index page object; the checksum is of all its bytes."""

    key: str
    num_bytes: int
    num_chunks: int
    checksum: bytes


def check_chunk(chunk: ChunkRecord, tensors: Sequence[TensorRecord], where: str) -> None:
    """Raise Corrupt if a chunk is no part of the tensor it names, or of a size that no chunk has."""
    if chunk.tensor >= len(tensors):
        raise Corrupt(f"a chunk in {where} belongs to the tensor number {chunk.tensor} of {len(tensors)}")
    tensor = tensors[chunk.tensor]
    whole = Box.whole(tensor.shape)
    num_dims = len(chunk.box.size)
    if num_dims != len(tensor.shape) or chunk.box.is_empty or chunk.box.intersect(whole) != chunk.box:
        raise Corrupt(
            f"a chunk in {where} does not lie within {tensor.name} of shape {tensor.shape}: {chunk.box}"
        )
    num_raw_bytes = chunk.box.numel * DTYPES[tensor.dtype].itemsize
    most = num_raw_bytes if chunk.codec is Codec.RAW else num_raw_bytes + num_raw_bytes // 64 + 1024
    least = num_raw_bytes if chunk.codec is Codec.RAW else 1
    if num_raw_bytes > MAX_CHUNK_BYTES or not least <= chunk.num_bytes <= most:
        raise Corrupt(
            f"a chunk of {tensor.name} in {where} cannot store {num_raw_bytes} bytes in {chunk.num_bytes}"
        )


def shape_from_json(fields: Fields, dtype: str, where: str) -> tuple[int, ...]:
    """Take the field "shape": at most 32 dims, and no more elements than memory has addresses."""
    sizes = fields.items("shape", MAX_DIMS)
    shape = tuple(size for size in sizes if type(size) is int and 0 <= size <= MAX_TENSOR_BYTES)
    occupied = math.prod(
        size for size in shape if size
    )  # an empty tensor's other dims are bounded all the same
    if len(shape) != len(sizes) or occupied * DTYPES[dtype].itemsize > MAX_TENSOR_BYTES:
        raise Corrupt(f"a tensor in {where} cannot have the shape {str(sizes)[:80]}")
    return shape


def dtype_from_json(fields: Fields, where: str) -> str:
    """Take the field "dtype"."""
    dtype = fields.text("dtype")
    if dtype not in DTYPES:
        raise Corrupt(f"a tensor in {where} has the unknown dtype {dtype[:80]!r}")
    return dtype
