"""How a chunk's bytes are stored: as they are, or compressed. A decoder makes no more than was promised."""

from enum import IntEnum

import xxhash
import zstandard

from checkpoint.errors import Corrupt

Buffer = bytes | bytearray | memoryview


class Codec(IntEnum):
    """How stored bytes were made from raw ones. The numbers are part of the format."""

    RAW = 0
    ZSTD = 1


def checksum(data: Buffer) -> bytes:
    """Return the xxh3_128 digest of the data, 16 bytes in canonical (big-endian) order."""
    return xxhash.xxh3_128_digest(data)


def encode(codec: Codec, data: Buffer, level: int = 1) -> Buffer:
    """Return the data as it is to be stored; RAW returns the very buffer it was given."""
    match codec:
        case Codec.RAW:
            return data
        case Codec.ZSTD:
            return zstandard.ZstdCompressor(level=level).compress(data)


def decode(codec: Codec, stored: Buffer, num_raw_bytes: int) -> Buffer:
    """Return the raw bytes. Allocates no more than `num_raw_bytes`, whatever the stored bytes claim.

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
            return _unzstd(stored, num_raw_bytes)


def _unzstd(stored: Buffer, num_raw_bytes: int) -> bytes:
    # The frame's own claim decides what the library allocates: believe it only if it is what we expect.
    try:
        claimed = zstandard.frame_content_size(stored)
        if claimed != num_raw_bytes:
            raise Corrupt(f"a ZSTD chunk claims {claimed} raw bytes instead of {num_raw_bytes}")
        raw = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"a ZSTD chunk does not decode: {error}") from error
    if len(raw) != num_raw_bytes:
        raise Corrupt(f"a ZSTD chunk holds {len(raw)} bytes instead of {num_raw_bytes}")
    return raw
