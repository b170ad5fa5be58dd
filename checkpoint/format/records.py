"""What a manifest, its pages and its packs are made of, and the bounds that every one of them keeps."""

import math
from dataclasses import dataclass, field

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
MAX_CHAIN = 16  # deltas between a chunk and a base that is no delta


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """A stored box: `num_bytes` at `offset` of a pack. Checksum and fingerprint are of the raw bytes.

    `tensor` and `pack` are places in the lists of tensors and packs that the record is read with. With a
    `base`, what is stored is the raw bytes XOR those of the base: the same box of the same tensor, earlier.
    A chunk that is yet to be stored brings the `sums` of its blocks along, which go into the pack with it.
    """

    tensor: int
    box: Box
    codec: Codec
    pack: int
    offset: int
    num_bytes: int
    checksum: bytes
    fingerprint: int
    base: "ChunkRecord | None" = None
    sums: bytes = field(default=b"", compare=False, repr=False)

    @property
    def num_bases(self) -> int:
        """How many chunks have to be read besides this one to know its content."""
        return 0 if self.base is None else 1 + self.base.num_bases


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
    """An index page object; the checksum is of all its bytes.

    Its chunks belong to tensors from number `first_tensor` to number `last_tensor`, and to no other.
    """

    key: str
    num_bytes: int
    num_chunks: int
    checksum: bytes
    first_tensor: int
    last_tensor: int


def shape_from_json(fields: Fields, dtype: str, where: str) -> tuple[int, ...]:
    """Take the field "shape": at most 32 dims, and no more elements than memory has addresses."""
    sizes = fields.items("shape", MAX_DIMS)
    shape = tuple(size for size in sizes if type(size) is int and 0 <= size <= MAX_TENSOR_BYTES)
    occupied = math.prod(
        size for size in shape if size
    )  # an empty tensor's other dims are bounded all the same
    if len(shape) != len(sizes) or occupied * DTYPES[dtype].itemsize > MAX_TENSOR_BYTES:
        raise Corrupt(f"a tensor in {where} cannot have a shape like {shape[:8]}")
    return shape


def dtype_from_json(fields: Fields, where: str) -> str:
    """Take the field "dtype"."""
    dtype = fields.text("dtype")
    if dtype not in DTYPES:
        raise Corrupt(f"a tensor in {where} has the unknown dtype {dtype[:80]!r}")
    return dtype
