"""zstandard frames: what is written declares its size, and a reader makes no more than it was promised."""

from collections import deque

import numpy as np
import zstandard

from checkpoint.errors import Corrupt

Buffer = bytes | bytearray | memoryview

WORTH_IT = 0.97  # of the size: what shrinks less is stored as it is, which costs nothing to read
MIN_LEVEL, MAX_LEVEL = -7, zstandard.MAX_COMPRESSION_LEVEL
_SLICES = 4
_SLICE_BYTES = 4096

# Floats repeat in nothing but their most frequent bytes, which entropy coding alone takes care of: a small
# table and long matches keep the search for repetitions, most of the time a level takes, out of its way.
_BY_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, min_match=7, target_length=0
)
_idle: deque[zstandard.ZstdCompressor] = (
    deque()
)  # as many as were ever in use at once: one makes one frame a time


def compress(data: Buffer, level: int) -> bytes:
    """Return one frame that declares its content size."""
    return zstandard.ZstdCompressor(level=level).compress(data)


def compress_by_entropy(data: Buffer) -> bytes:
    """Return such a frame of data in which hardly anything repeats but single bytes."""
    try:
        compressor = _idle.pop()
    except IndexError:
        compressor = zstandard.ZstdCompressor(compression_params=_BY_ENTROPY)
    frame = compressor.compress(data)
    _idle.append(compressor)
    return frame


def sample(data: Buffer) -> bytes:
    """Return a few slices from all over the data; all of it if it is short."""
    view = memoryview(data).cast("B")
    if len(view) <= _SLICES * _SLICE_BYTES:
        return bytes(view)
    starts = np.linspace(0, len(view) - _SLICE_BYTES, _SLICES).astype(int).tolist()
    return b"".join(view[start : start + _SLICE_BYTES] for start in starts)


def decompress(frame: Buffer, num_bytes: int) -> bytes:
    """Return the content of a frame, which has to be `num_bytes` long; allocates no more than that.

    Raises Corrupt if the frame is not one that `compress` writes, or its content has another length.
    """
    # The frame's own claim decides what the library allocates: believe it only if it is what we expect.
    try:
        claimed = zstandard.frame_content_size(frame)
        if claimed != num_bytes:
            raise Corrupt(f"a zstandard frame claims {claimed} bytes instead of {num_bytes}")
        raw = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"a zstandard frame does not decode: {error}") from error
    if len(raw) != num_bytes:
        raise Corrupt(f"a zstandard frame holds {len(raw)} bytes instead of {num_bytes}")
    return raw
