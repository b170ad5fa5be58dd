"""How a chunk's bytes are stored: as they are, or compressed. A decoder makes no more than was promised."""

from enum import IntEnum
from typing import Any

import numpy as np
import xxhash

from checkpoint.errors import Corrupt
from checkpoint.format.frames import WORTH_IT, Buffer, compress, decompress, sample
from checkpoint.format.planes import PLANE_WIDTHS, join_planes, split_planes

__all__ = ["Buffer", "Codec", "checksum", "codec_of", "decode", "encode", "xor_bytes"]

_MIN_BYTES = 4096  # less is not worth the time that it takes to set up a compressor


class Codec(IntEnum):
    """How stored bytes were made from raw ones. The numbers are part of the format."""

    RAW = 0
    ZSTD = 1
    PLANES = 2


def codec_of(given: Any) -> Codec:
    """Return a codec, also of its name or its number. Raises ValueError that names those there are."""
    try:
        return Codec[given.upper()] if isinstance(given, str) else Codec(given)
    except (KeyError, ValueError):
        names = ", ".join(repr(one.name.lower()) for one in Codec)
        raise ValueError(f"`codec` is one of {names}, not {given!r}") from None


def checksum(data: Buffer) -> bytes:
    """Return the xxh3_128 digest of the data, 16 bytes in canonical (big-endian) order."""
    return xxhash.xxh3_128_digest(data)


def encode(codec: Codec, data: Buffer, level: int = 1, *, dtype: str = "uint8") -> tuple[Codec, Buffer]:
    """Return the data as it is to be stored, and by which codec: RAW, the very buffer, if nothing is gained.

    PLANES takes floats apart; of anything else it asks a sample whether `level` of zstandard pays. The buffer
    is never written to.
    """
    if codec is Codec.RAW:
        return codec, data
    raw = memoryview(data).cast("B")
    match codec:
        case Codec.ZSTD:
            stored = compress(raw, level)
            return (Codec.ZSTD, stored) if len(stored) < len(raw) else (Codec.RAW, data)
        case Codec.PLANES if len(raw) >= _MIN_BYTES:
            width = PLANE_WIDTHS.get(dtype)
            if width and len(raw) % width == 0:
                planes = split_planes(raw, width)
                return (Codec.RAW, data) if planes is None else (Codec.PLANES, planes)
            few = sample(raw)
            if len(compress(few, level)) < WORTH_IT * len(few):
                return encode(Codec.ZSTD, data, level)
    return Codec.RAW, data


def decode(codec: Codec, stored: Buffer, num_raw_bytes: int) -> Buffer:
    """Return the raw bytes. Allocates at most a few times `num_raw_bytes`, whatever the stored bytes claim.

    Raises Corrupt if they do not decode to exactly that many.
    """
    match codec:
        case Codec.RAW:
            if memoryview(stored).nbytes != num_raw_bytes:
                raise Corrupt(
                    f"a raw chunk holds {memoryview(stored).nbytes} bytes instead of {num_raw_bytes}"
                )
            return stored
        case Codec.ZSTD:
            return decompress(stored, num_raw_bytes)
        case Codec.PLANES:
            return join_planes(stored, num_raw_bytes)


def xor_bytes(one: Buffer, other: Buffer) -> Buffer:
    """Return the XOR of two buffers of the same length: a delta, or what a delta makes of its base.

    Raises Corrupt if they differ in length.
    """
    first, second = np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)
    if len(first) != len(second):
        raise Corrupt(f"a chunk of {len(first)} bytes cannot be a delta against {len(second)} bytes")
    return (first ^ second).data
