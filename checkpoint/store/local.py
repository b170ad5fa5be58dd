"""A store in a directory of this machine: durable when a call returns, whole or absent after a crash."""

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoint.errors import AlreadyExists, NotFound, StoreRefused, StoreUnavailable
from checkpoint.store.contract import (
    Buffer,
    ByteRange,
    Data,
    Entry,
    check_key,
    check_prefix,
    check_ranges,
    parts_of,
)
from checkpoint.store.paths import file_url
from checkpoint.store.writeback import write_parts

_INCOMING = ".incoming"  # values being written; no key can name it
_ABANDONED_S = 24 * 3600.0  # what lies there longer was left by a crash
_ABSENT = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


class LocalStore:
    """Values as files under a root directory, which the first write creates.

    A value is written and synced under another name, then linked (`put_new`: the kernel admits one) or
    renamed (`put`) into place, and its directory is synced.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).absolute()
        self._is_swept = False

    def __str__(self) -> str:
        return file_url(self._root)

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free."""
        path = self._path(key)
        with self._told("write", key), self._written(data) as written:
            _make_directory(path.parent)
            try:
                os.link(written, path)
            except FileExistsError:
                raise AlreadyExists(f"{key} exists already in {self}; nothing was written") from None
            _sync(path.parent)

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        path = self._path(key)
        with self._told("write", key), self._written(data) as written:
            _make_directory(path.parent)
            os.replace(written, path)
            _sync(path.parent)

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges, or the whole value."""
        with self._opened(key) as (descriptor, num_bytes):
            wanted = [ByteRange(0, num_bytes)] if ranges is None else ranges
            check_ranges(key, wanted, num_bytes)
            return [_read(descriptor, part) for part in wanted]

    def read_into(self, key: str, offset: int, pieces: Iterable[memoryview]) -> None:
        """Fill pieces of memory, one by one, with the bytes of a value from an offset on.

        Raises NotFound if there are too few.
        """
        with self._opened(key) as (descriptor, num_bytes):
            for piece in pieces:
                check_ranges(key, [ByteRange(offset, piece.nbytes)], num_bytes)
                _fill(descriptor, offset, piece.cast("B"))
                offset += piece.nbytes

    @contextmanager
    def descriptor(self, key: str) -> Iterator[int]:
        """Hold a value open as a file, for compiled code to read. Raises NotFound."""
        with self._opened(key) as (descriptor, _):
            yield descriptor

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix."""
        folder = check_prefix(prefix).rpartition("/")[0]
        with self._told("list", prefix):
            found = self._walk(self._root / folder, f"{folder}/" if folder else "")
            return sorted(
                (entry for entry in found if entry.key.startswith(prefix)), key=lambda entry: entry.key
            )

    def delete(self, key: str) -> None:
        """Remove the file."""
        path = self._path(key)
        with self._told("delete", key), suppress(FileNotFoundError):
            path.unlink()
            _sync(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _walk(self, folder: Path, prefix: str) -> Iterator[Entry]:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
                continue
            with suppress(FileNotFoundError):  # deleted since
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                yield Entry(f"{prefix}{entry.name}", status.st_size, status.st_mtime)

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        """Hold a value open for reading: its descriptor, and how many bytes it has."""
        with self._told("read", key):
            descriptor, num_bytes = _open_file(f"{self._root}/{check_key(key)}")
            try:
                yield descriptor, num_bytes
            finally:
                os.close(descriptor)

    @contextmanager
    def _written(self, data: Data) -> Iterator[Path]:
        """Hold the value, written and synced, under a name that no reader looks at; remove the name after."""
        incoming = self._root / _INCOMING
        _make_directory(incoming)
        self._sweep(incoming)
        path = incoming / uuid.uuid4().hex
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                write_parts(file.fileno(), parts_of(data))
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _sweep(self, incoming: Path) -> None:
        """Remove what a crash left half-written, once per store object: it never was a value."""
        if self._is_swept:
            return
        self._is_swept = True
        for entry in os.scandir(incoming):
            with suppress(FileNotFoundError):
                if entry.stat().st_mtime < time.time() - _ABANDONED_S:
                    os.unlink(entry.path)

    @contextmanager
    def _told(self, verb: str, key: str) -> Iterator[None]:
        """Say what the system's errors mean for the store."""
        try:
            yield
        except OSError as error:
            if verb == "read" and error.errno in _ABSENT:
                raise NotFound(f"{key} is not in {self}") from error
            if error.errno == errno.ENOTDIR and self._root.is_file():
                raise StoreRefused(
                    f"{self} is a file, and a store is a directory: give the store's, or import the "
                    "checkpoint first if this is one of another framework"
                ) from error
            message = f"cannot {verb} {key!r} in {self}: {error.strerror or error}"
            if error.errno in _REFUSED:
                raise StoreRefused(
                    f"{message}; check the path, its permissions and the space left"
                ) from error
            raise StoreUnavailable(message) from error


def _open_file(path: str) -> tuple[int, int]:
    """Open a file to be read, but nothing else that has a name: a pipe would be waited for, for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "it is no file", path)
    return descriptor, status.st_size


def _make_directory(path: Path) -> None:
    """Create a directory and its parents, each durable in the one above."""
    if path.is_dir():
        return
    if path.parent != path:
        _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int, part: ByteRange) -> bytearray:
    """Read exactly a range, whose bytes are known to be there."""
    data = bytearray(part.num_bytes)
    _fill(descriptor, part.offset, memoryview(data))
    return data


def _fill(descriptor: int, offset: int, memory: memoryview) -> None:
    while memory:
        count = os.preadv(descriptor, [memory], offset)
        if not count:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        memory, offset = memory[count:], offset + count
