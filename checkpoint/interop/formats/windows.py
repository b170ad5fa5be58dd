"""A part of a file as a file of its own: both its ends are kept, since archives have their tables there."""

import io
from collections.abc import Sequence
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.interop.place import Place

_END_BYTES = 16 << 10


class Window:
    """The bytes of a file from one place to another."""

    def __init__(self, place: Place, path: str, span: Sequence[int]) -> None:
        self.path, self.offset = path, span[0]
        self.num_bytes = span[1] - span[0]
        self._place = place
        if not 0 <= span[0] <= span[1] <= place.files[path]:
            raise Corrupt(f"{place.spell(path)} has {place.files[path]} bytes; {span} is not within it")
        kept = min(self.num_bytes, 2 * _END_BYTES)
        if kept == self.num_bytes:
            self._head = self._tail = place.read(path, self.offset, kept)
        else:
            self._head = place.read(path, self.offset, _END_BYTES)
            self._tail = place.read(path, self.offset + self.num_bytes - _END_BYTES, _END_BYTES)

    @classmethod
    def of(cls, place: Place, path: str, offset: int, data: bytes) -> "Window":
        """Return a window whose bytes have been read already."""
        window = cls.__new__(cls)
        window.path, window.offset, window.num_bytes = path, offset, len(data)
        window._place, window._head, window._tail = place, data, data
        return window

    def __str__(self) -> str:
        part = f" (from byte {self.offset})" if self.offset else ""
        return f"{self._place.spell(self.path)}{part}"

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return some bytes; fewer at the end."""
        num_bytes = max(0, min(num_bytes, self.num_bytes - offset))
        from_tail = offset - (self.num_bytes - len(self._tail))
        if offset + num_bytes <= len(self._head):
            return self._head[offset : offset + num_bytes]
        if from_tail >= 0:
            return self._tail[from_tail : from_tail + num_bytes]
        return self._place.read(self.path, self.offset + offset, num_bytes)

    def expect(self, name: str, span: tuple[int, int], crc: int) -> None:
        """Take note of the CRC-32 of a part, which is held against what is read of it: see `Place.settle`."""
        self._place.expect(self.path, name, (self.offset + span[0], span[1]), crc)

    def as_file(self) -> "_File":
        """Return it as a file that can be read at any position."""
        return _File(self)


class _File(io.RawIOBase):
    def __init__(self, window: Window) -> None:
        self._window, self._position = window, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._window.num_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"there is no position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._window.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
