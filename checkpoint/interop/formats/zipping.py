"""Writes files of torch.save as streams: a zip whose entries are neither compressed nor held in memory.

Its length follows from the names and sizes of its entries, so that it is known before anything is written.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

_ALIGNMENT = 64  # as torch.save has it, so that tensors can be mapped
_ROOT = "archive"
_MANY = 0xFFFFFFFF
_MANY_ENTRIES = 0xFFFF
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_AFTERWARDS, _UTF8 = 0x8, 0x800  # the checksum comes after the data; names are in UTF-8
_DATE = 0x21  # the first day that a zip can tell: files of one content are the same


@dataclass(frozen=True, slots=True)
class _Written:
    name: bytes
    num_bytes: int
    offset: int
    checksum: int


class ZipStream:
    """A zip that is written from its beginning to its end, at any place of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._written: list[_Written] = []

    def add(self, name: str, num_bytes: int, blocks: Iterable[bytes | memoryview]) -> None:
        """Write an entry. The blocks have so many bytes together."""
        offset = self._position
        self._put(_local_header(name, num_bytes, offset))
        checksum = 0
        for block in blocks:
            checksum = zlib.crc32(block, checksum)
            self._put(block)
        self._put(
            struct.pack("<4s3L" if num_bytes < _MANY else "<4sL2Q", b"PK\7\10", checksum, *2 * [num_bytes])
        )
        self._written.append(_Written(f"{_ROOT}/{name}".encode(), num_bytes, offset, checksum))

    def end(self) -> int:
        """Write the directory. Returns how many bytes the zip has."""
        begin = self._position
        for entry in self._written:
            self._put(_central_header(entry))
        self._put(_end(len(self._written), begin, self._position - begin))
        return self._position

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._position += memoryview(data).nbytes


def length_of(entries: Sequence[tuple[str, int]]) -> int:
    """Return how many bytes a zip of entries of these names and sizes has."""
    position, written = 0, []
    for name, num_bytes in entries:
        written.append(_Written(f"{_ROOT}/{name}".encode(), num_bytes, position, 0))
        position += len(_local_header(name, num_bytes, position)) + num_bytes
        position += 16 if num_bytes < _MANY else 24
    directory = sum(len(_central_header(entry)) for entry in written)
    return position + directory + len(_end(len(written), position, directory))


def _local_header(name: str, num_bytes: int, offset: int) -> bytes:
    """Return what comes before an entry's data, which it aligns."""
    path = f"{_ROOT}/{name}".encode()
    is_large = num_bytes >= _MANY
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if is_large else b""
    begin = offset + _LOCAL.size + len(path) + len(extra) + 4
    extra += struct.pack("<2sH", b"FB", -begin % _ALIGNMENT) + b"Z" * (-begin % _ALIGNMENT)
    size = _MANY if is_large else 0
    fields = (45 if is_large else 20, _AFTERWARDS | _UTF8, 0, 0, _DATE, 0, size, size, len(path), len(extra))
    return _LOCAL.pack(b"PK\3\4", *fields) + path + extra


def _central_header(entry: _Written) -> bytes:
    sizes = [entry.num_bytes] * 2 if entry.num_bytes >= _MANY else []
    offset = [entry.offset] if entry.offset >= _MANY else []
    long = struct.pack(f"<2H{len(sizes + offset)}Q", 1, 8 * len(sizes + offset), *sizes, *offset)
    extra = long if sizes or offset else b""
    version = 45 if extra else 20
    size = min(entry.num_bytes, _MANY)
    header = _CENTRAL.pack(
        *(b"PK\1\2", version, version, _AFTERWARDS | _UTF8, 0, 0, _DATE, entry.checksum, size, size),
        *(len(entry.name), len(extra), 0, 0, 0, 0, min(entry.offset, _MANY)),
    )
    return header + entry.name + extra


def _end(count: int, offset: int, size: int) -> bytes:
    short = min(count, _MANY_ENTRIES), min(count, _MANY_ENTRIES), min(size, _MANY), min(offset, _MANY)
    end = _END.pack(b"PK\5\6", 0, 0, *short, 0)
    if count < _MANY_ENTRIES and offset < _MANY and size < _MANY:
        return end
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, offset)
    return end64 + _LOCATOR.pack(b"PK\6\7", 0, offset + size, 1) + end
