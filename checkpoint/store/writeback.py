"""Writing a large file fast: its room is reserved at once, and its disk begins while more is being copied."""

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence

_STRETCH_BYTES = 8 << 20  # smaller files are left to one fsync
_STRETCH_PIECES = 512
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin to write what is dirty in the range; wait for nothing
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _fallocate is not None:
    _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def write_parts(descriptor: int, parts: Sequence[memoryview]) -> None:
    """Write the parts, without joining them; the disk begins with each stretch while the next is copied."""
    num_bytes = sum(part.nbytes for part in parts)
    if num_bytes > _STRETCH_BYTES:
        _reserve(descriptor, num_bytes)
    offset = 0
    for stretch in _stretches(parts):
        left = stretch
        while left:
            left = _after(left, os.writev(descriptor, left))
        length = sum(part.nbytes for part in stretch)
        if num_bytes > _STRETCH_BYTES:
            begin_writing(descriptor, offset, length)
        offset += length


def _stretches(parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Yield the parts in lists of so many bytes, and of no more pieces than the system takes at once."""
    stretch: list[memoryview] = []
    room = _STRETCH_BYTES
    for part in parts:
        rest = part
        while rest:
            stretch.append(rest[:room])
            rest, room = rest[room:], room - stretch[-1].nbytes
            if not room or len(stretch) == _STRETCH_PIECES:
                yield stretch
                stretch, room = [], _STRETCH_BYTES
    if stretch:
        yield stretch


def _after(pieces: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Return what is left of the pieces after so many bytes of them."""
    for number, piece in enumerate(pieces):
        if num_bytes < piece.nbytes:
            return [piece[num_bytes:], *pieces[number + 1 :]]
        num_bytes -= piece.nbytes
    return []


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Give a new file its room in one piece, where the file system can. Raises OSError if there is none."""
    if _fallocate is None or not num_bytes:
        return
    while _fallocate(descriptor, 0, 0, num_bytes):
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def begin_writing(descriptor: int, offset: int, num_bytes: int) -> None:
    """Hand these bytes of a file to its disk, while the next are still being copied. Only ever a hint."""
    if _sync_file_range is not None and num_bytes:
        _sync_file_range(descriptor, offset, num_bytes, _WRITE)
