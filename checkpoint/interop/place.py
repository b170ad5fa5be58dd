"""Directories of foreign files, wherever fsspec finds them, read by ranges."""

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from checkpoint.errors import (
    CheckpointError,
    Corrupt,
    Incomplete,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.interop.checksums import Checksums
from checkpoint.interop.turns import TURNS
from checkpoint.store.paths import escaped, is_file_url, local_path

DRAFT = ".holdfast-draft"
_READ_AHEAD_BYTES = 1 << 20
_GO_BYTES = 4 << 20  # of what is read for its checksum only
_CHANGES = ("ETag", "etag", "generation", "md5Hash")  # the first of these that a server tells
_MAX_ASKED = 16  # files about which a server is asked one by one
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED_TYPES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}


class Place:
    """A directory that is only read: of this machine (a path, `file://`) or behind a URL that fsspec knows.

    A URL of a single file is a directory with that one file. Thread-safe; pickles as its URL. A place
    that is marked as a draft is not believed but by whoever names the attempt that writes it: `draft`.
    """

    def __init__(self, url: str, draft: str | None = None) -> None:
        self.url, self._draft = url, draft
        self._lock = threading.Lock()
        self._client: tuple[int, Any, str] | None = None
        self._listing: _Listing | None = None
        self._checksums = Checksums()
        self._marks: dict[str, Any] = {}  # of the files that were read, what they were then

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[type["Place"], tuple[str, str | None]]:
        return Place, (self.url, self._draft)

    def spell(self, path: str) -> str:
        """Name one of its files for people; the single file of a URL is called as that."""
        return self.url if self.url.rpartition("/")[2] == path else f"{path} in {self.url}"

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file, by its path below the directory, as they were first seen.

        Raises NotFound if there is none, Incomplete if a conversion into the place did not finish.
        """
        return self._listed().files

    def below(self, folder: str) -> "Place":
        """Return a folder in this one as a place of its own; "" is this one."""
        if not folder:
            return self
        name = escaped(folder) if is_file_url(self.url) else folder
        found = Place(f"{self.url.rstrip('/')}/{name}", self._draft)
        found._listing = self._listed().below(folder)
        return found

    def expect(self, path: str, name: str, span: tuple[int, int], crc: int) -> None:
        """Take note of the CRC-32 that a file tells of a part: its first byte, and how many there are.

        Drafts do without: all of one is held against what should be in it.
        """
        if self._draft is None:
            self._checksums.expect(path, name, span, crc)

    def settle(self) -> None:
        """Read what is missing to tell whether what was read is sound, and see that no file became another.

        Raises Corrupt.
        """
        for gap in self._checksums.gaps():
            for begin in range(gap.begin, gap.stop, _GO_BYTES):
                self.read(gap.path, begin, min(_GO_BYTES, gap.stop - begin))
        now = self._marks_now()
        for path, mark in self._marks.items():
            if now.get(path) != mark:
                raise Corrupt(
                    f"{self.spell(path)} was changed while it was being read, so parts of it may be of "
                    "another checkpoint. Wait until nobody writes it, and do it again"
                )

    def read(self, path: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """Return a range of a file, or all from an offset on. Raises NotFound, Corrupt if it is too short."""
        wanted = self._size(path) - offset if num_bytes is None else num_bytes
        self._check_range(path, offset, wanted)
        if self.local(path) is None:
            self._mark(path)
            data = self._fetch(path, offset, wanted)
            self._saw(path, offset, memoryview(data))
            return data
        out = np.empty(wanted, np.uint8)
        self.read_into(path, offset, out)
        return out.tobytes()

    def read_into(self, path: str, offset: int, out: "np.ndarray[Any, Any]") -> None:
        """Fill a contiguous array with the bytes from an offset on. Raises as `read` does."""
        self._check_range(path, offset, out.nbytes)
        self._mark(path)
        local = self.local(path)
        row = memoryview(out.reshape(-1).view(np.uint8).data)
        if local is None:
            row[:] = self._fetch(path, offset, out.nbytes)
        else:
            with told(self.spell(path)):
                _read_local(local, offset, row)
        self._saw(path, offset, row)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading at any position."""
        self._size(path)
        self._mark(path)
        with told(self.spell(path)):
            fs = self._fs()[0]
            return cast(BinaryIO, fs.open(self._full(path), "rb", block_size=_READ_AHEAD_BYTES))

    def local(self, path: str) -> Path | None:
        """Return where a file lies on this machine, if it does: it can be mapped."""
        return Path(self._full(path)) if isinstance(self._fs()[0], LocalFileSystem) else None

    def _mark(self, path: str) -> None:
        """Take note of what a file is, before anything of it is read. Drafts are nobody else's."""
        if path in self._marks or self._draft is not None:
            return
        local = self.local(path)
        mark = self._listed().marks.get(path) if local is None else _mark_here(local)
        if mark is not None:
            self._marks.setdefault(path, mark)

    def _marks_now(self) -> Mapping[str, Any]:
        if not self._marks:
            return {}
        if isinstance(self._fs()[0], LocalFileSystem):
            return {path: _mark_here(Path(self._full(path))) for path in self._marks}
        with told(self.url):
            if len(self._marks) > _MAX_ASKED:
                return _list(*self._fs(), self.url, self._draft).marks
            return {path: _mark_there(self._fs()[0].info(self._full(path))) for path in self._marks}

    def _saw(self, path: str, offset: int, data: memoryview) -> None:
        damage = self._checksums.saw(path, offset, data)
        if damage is not None:
            raise Corrupt(
                f"{damage.name} of {self.spell(path)} was damaged after it was written: its CRC-32 is "
                f"{damage.found:08x}, and the file says {damage.told:08x}. Get another copy of the file"
            )

    def _fetch(self, path: str, offset: int, wanted: int) -> bytes:
        if not wanted:
            return b""
        with told(self.spell(path)):
            data = self._fs()[0].cat_file(self._full(path), start=offset, end=offset + wanted)
        if len(data) != wanted:
            raise Corrupt(f"{len(data)} of {wanted} bytes at {offset} of {self.spell(path)} were read")
        return bytes(data)

    def _check_range(self, path: str, offset: int, wanted: int) -> None:
        size = self._size(path)
        if offset < 0 or wanted < 0 or offset + wanted > size:
            raise Corrupt(
                f"{self.spell(path)} has {size} bytes, and should have {wanted} at {offset}: cut short?"
            )

    def _size(self, path: str) -> int:
        try:
            return self.files[path]
        except KeyError:
            raise NotFound(f"there is no {path} in {self.url}") from None

    def _full(self, path: str) -> str:
        return f"{self._listed().root}/{path}"

    def _listed(self) -> "_Listing":
        if self._listing is None:
            with told(self.url):
                self._listing = _list(*self._fs(), self.url, self._draft)
        return self._listing

    def _fs(self) -> tuple[Any, str]:
        """Return this process's client: an inherited one would hang after a fork."""
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                with told(self.url):
                    self._client = (os.getpid(), *filesystem(self.url))
            return self._client[1:]


@dataclass(frozen=True, slots=True)
class _Listing:
    """A directory, the sizes of its files, and what tells whether one was replaced, where servers do."""

    root: str
    files: Mapping[str, int]
    marks: Mapping[str, Any]

    def below(self, folder: str) -> "_Listing":
        """Return what is in a folder of it."""
        files, marks = (
            {
                path.removeprefix(f"{folder}/"): item
                for path, item in one.items()
                if path.startswith(f"{folder}/")
            }
            for one in (self.files, self.marks)
        )
        return _Listing(f"{self.root}/{folder}", files, marks)


def _mark_here(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written to, or another takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _mark_there(info: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return what a server tells that changes with a file; None if nothing."""
    told = (str(info[name]).strip('"') for name in _CHANGES if info.get(name) is not None)
    return next(((mark, info.get("size")) for mark in told), None)


def _list(fs: Any, root: str, url: str, draft: str | None) -> _Listing:
    """Return the directory and its files."""
    if fs.isfile(root):
        parent, _, name = root.rpartition("/")
        info = fs.info(root)
        return _Listing(parent, {name: int(info["size"])}, {name: _mark_there(info)})
    found, prefix = fs.find(root, detail=True), f"{root}/"
    files = {
        path.removeprefix(prefix): int(each["size"])
        for path, each in sorted(found.items())
        if path.startswith(prefix) and not path.startswith(f"{prefix}{TURNS}/")
    }
    if not files:
        _check_reached(fs, root)
        raise NotFound(f"{url} is neither a file nor a directory with files")
    if draft is not None:
        files.pop(f"{DRAFT}-{draft}", None)
    if any(name.startswith(DRAFT) for name in files):
        raise Incomplete(f"the conversion that wrote {url} did not finish: run it again, or remove this")
    marks = {path: _mark_there(found[f"{prefix}{path}"]) for path in files}
    return _Listing(root, files, marks)


def _check_reached(fs: Any, root: str) -> None:
    """Raise what kept a client from its files: some only tell that they found nothing."""
    if isinstance(fs, LocalFileSystem) and os.path.isdir(root):
        os.listdir(root)
    try:
        fs.info(root)
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None


def filesystem(url: str) -> tuple[Any, str]:
    """Return the client for a URL, and the path that it knows it by. Raises StoreRefused.

    As in a store's URL, percent escapes are decoded in one of a file, and in nothing else; what has no "://"
    is a path, whatever is in it. A URL may be a chain of fsspec's (`simplecache::s3://bucket/prefix`).
    """
    if not url:
        raise StoreRefused("an empty text names no place: give a path or a URL like s3://bucket/prefix")
    url = url.removeprefix("obstore+")
    if is_file_url(url) or "://" not in url:
        path = local_path(url) if is_file_url(url) else os.path.expanduser(url)
        return LocalFileSystem(use_listings_cache=False, skip_instance_cache=True), os.path.abspath(path)
    scheme, separator, rest = url.rpartition("::")[2].partition("://")  # a chain may end in a path
    if separator and scheme != "memory" and not rest.strip("/"):
        raise StoreRefused(f"{url!r} names no place: give the bucket or container too, {scheme}://NAME")
    if separator and scheme not in fsspec.available_protocols():
        raise StoreRefused(f"{url!r} names no place: fsspec knows no {scheme!r}")
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return fs, root.rstrip("/")


def is_here(url: str) -> bool:
    """Whether a URL is of this machine's file systems."""
    with told(url):
        return isinstance(filesystem(url)[0], LocalFileSystem)


def _read_local(path: Path, offset: int, row: memoryview) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while len(row):
            num_bytes = os.preadv(descriptor, [row], offset)
            if not num_bytes:
                raise Corrupt(f"{path} ended at {offset}, with {len(row)} bytes to come: it was cut short")
            row, offset = row[num_bytes:], offset + num_bytes
    finally:
        os.close(descriptor)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what file systems and clients raise, each of its own kind, into errors of ours."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{what} is not there: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StoreRefused(f"{what}: {error.strerror}; make space, or give another place") from error
        text = f"{what}: {type(error).__name__}: {error}"
        is_refused = isinstance(error, PermissionError | ImportError | ValueError | NotADirectoryError)
        if is_refused or type(error).__name__ in _REFUSED_TYPES:
            raise StoreRefused(f"{text}; check the URL and the credentials in the environment") from error
        raise StoreUnavailable(text) from error
