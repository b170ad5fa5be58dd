"""Directories of foreign files, wherever fsspec finds them: ranged reads, and writes whole or absent."""

import glob
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from checkpoint.errors import (
    AlreadyExists,
    CheckpointError,
    Corrupt,
    Incomplete,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)

_DRAFT = ".holdfast-draft"
_PARTIAL = ".partial"
_ATTEMPT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_READ_AHEAD_BYTES = 1 << 20
# Their objects are there whole or not at all, and renaming one is copying it.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
_REFUSED_TYPES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}


class Place:
    """A directory that is only read: of this machine (a path, `file://`) or behind a URL that fsspec knows.

    A URL of a single file is a directory with that one file. Thread-safe; pickles as its URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._client: tuple[int, Any, str] | None = None
        self._listing: tuple[str, Mapping[str, int]] | None = None

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[type["Place"], tuple[str]]:
        return Place, (self.url,)

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file, by its path below the directory, as they were first seen.

        Raises NotFound if there is none, Incomplete if a conversion into the place did not finish.
        """
        return self._listed()[1]

    def read(self, path: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """Return a range of a file, or all from an offset on. Raises NotFound, Corrupt if it is too short."""
        wanted = self._size(path) - offset if num_bytes is None else num_bytes
        self._check_range(path, offset, wanted)
        if self.local(path) is None:
            return self._fetch(path, offset, wanted)
        out = np.empty(wanted, np.uint8)
        self.read_into(path, offset, out)
        return out.tobytes()

    def read_into(self, path: str, offset: int, out: "np.ndarray[Any, Any]") -> None:
        """Fill a contiguous array with the bytes from an offset on. Raises as `read` does."""
        self._check_range(path, offset, out.nbytes)
        local = self.local(path)
        row = memoryview(out.reshape(-1).view(np.uint8).data)
        if local is None:
            row[:] = self._fetch(path, offset, out.nbytes)
            return
        with _told(f"{path} in {self.url}"):
            _read_local(local, offset, row)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading at any position."""
        self._size(path)
        with _told(f"{path} in {self.url}"):
            fs = self._fs()[0]
            return cast(BinaryIO, fs.open(self._full(path), "rb", block_size=_READ_AHEAD_BYTES))

    def local(self, path: str) -> Path | None:
        """Return where a file lies on this machine, if it does: it can be mapped."""
        return Path(self._full(path)) if isinstance(self._fs()[0], LocalFileSystem) else None

    def _fetch(self, path: str, offset: int, wanted: int) -> bytes:
        if not wanted:
            return b""
        with _told(f"{path} in {self.url}"):
            data = self._fs()[0].cat_file(self._full(path), start=offset, end=offset + wanted)
        if len(data) != wanted:
            raise Corrupt(f"{len(data)} of {wanted} bytes at {offset} of {path} in {self.url} were read")
        return bytes(data)

    def _check_range(self, path: str, offset: int, wanted: int) -> None:
        size = self._size(path)
        if offset < 0 or wanted < 0 or offset + wanted > size:
            raise Corrupt(
                f"{path} in {self.url} has {size} bytes, and should have {wanted} at {offset}: cut short?"
            )

    def _size(self, path: str) -> int:
        try:
            return self.files[path]
        except KeyError:
            raise NotFound(f"there is no {path} in {self.url}") from None

    def _full(self, path: str) -> str:
        return f"{self._listed()[0]}/{path}"

    def _listed(self) -> tuple[str, Mapping[str, int]]:
        if self._listing is None:
            with _told(self.url):
                self._listing = _list(*self._fs(), self.url)
        return self._listing

    def _fs(self) -> tuple[Any, str]:
        """Return this process's client: an inherited one would hang after a fork."""
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                with _told(self.url):
                    self._client = (os.getpid(), *_filesystem(self.url))
            return self._client[1:]


class Draft:
    """A directory being written. Files that an earlier attempt of the same conversion finished are kept."""

    def __init__(self, fs: Any, root: str, kept: frozenset[str]) -> None:
        self._fs, self._root = fs, root
        self.kept = kept

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """Write a file from its beginning; it is there only when the block ends without an error."""
        target, what = f"{self._root}/{path}", f"{path} in {self._root}"
        partial = target if _is_object_store(self._fs) else target + _PARTIAL
        with _told(what):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            is_local = isinstance(self._fs, LocalFileSystem)
            file: Any = open(partial, "wb") if is_local else self._fs.open(partial, "wb")  # noqa: SIM115 - below
        try:
            yield cast(BinaryIO, _Written(file, what))
        except BaseException:
            _abandon(self._fs, file, partial)
            raise
        with _told(what):
            file.flush()
            if is_local:
                os.fsync(file.fileno())
            file.close()
            if is_local:
                os.replace(partial, target)
            elif partial != target:
                self._fs.mv(partial, target)


class _Written:
    """A file whose errors say which one it is."""

    def __init__(self, file: Any, what: str) -> None:
        self._file, self._what = file, what

    def write(self, data: Any) -> int:
        """Write bytes."""
        with _told(self._what):
            return int(self._file.write(data))

    def flush(self) -> None:
        """Do nothing: the end of the block does."""


@contextmanager
def drafting(url: str, attempt: str) -> Iterator[Draft]:
    """Write a new directory, whole or not at all; `attempt` identifies the conversion that is resumed.

    On this machine the directory is renamed into place at the end. Behind a URL each file lies where it
    belongs at once, and until the end an object says that they are a draft, which no reader then believes.
    Where an error or a kill left a draft of the same attempt, its finished files are kept.

    Raises AlreadyExists if something else is there.
    """
    if not _ATTEMPT.fullmatch(attempt):
        raise StoreRefused(f"an attempt is called by letters and digits, not {attempt!r}")
    with _told(url):
        fs, root = _filesystem(url)
    write = _drafting_here if isinstance(fs, LocalFileSystem) else _drafting_there
    with write(fs, root, url, attempt) as draft:
        yield draft


@contextmanager
def _drafting_here(fs: Any, root: str, url: str, attempt: str) -> Iterator[Draft]:
    path = Path(os.path.realpath(root))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise AlreadyExists(f"{url} exists: give a new one, nothing is overwritten")
    draft = path.with_name(f"{path.name}{_DRAFT}-{attempt}")
    with _told(url):
        for stale in path.parent.glob(f"{glob.escape(path.name)}{_DRAFT}-*"):
            if stale != draft:
                shutil.rmtree(stale)
        draft.mkdir(parents=True, exist_ok=True)
        files = [one for one in draft.rglob("*") if one.is_file() and one.suffix != _PARTIAL]
    yield Draft(fs, str(draft), frozenset(one.relative_to(draft).as_posix() for one in files))
    with _told(url):
        for partial in draft.rglob(f"*{_PARTIAL}"):
            partial.unlink()
        for directory in (draft, *(one for one in draft.rglob("*") if one.is_dir())):
            _sync(directory)
        if path.exists():
            path.rmdir()
        os.rename(draft, path)
        _sync(path.parent)


@contextmanager
def _drafting_there(fs: Any, root: str, url: str, attempt: str) -> Iterator[Draft]:
    mark = f"{root}/{_DRAFT}-{attempt}"
    with _told(url):
        there = {path.removeprefix(f"{root}/") for path in fs.find(root)} if fs.exists(root) else set()
        if there and f"{_DRAFT}-{attempt}" not in there:
            raise AlreadyExists(f"{url} exists: give a new one, nothing is overwritten")
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(mark, b"This conversion has not finished.\n")
    yield Draft(
        fs, root, frozenset(path for path in there if not path.startswith(_DRAFT) and _PARTIAL not in path)
    )
    with _told(url):
        fs.rm_file(mark)


def _list(fs: Any, root: str, url: str) -> tuple[str, Mapping[str, int]]:
    """Return the directory and its files."""
    if fs.isfile(root):
        parent, _, name = root.rpartition("/")
        return parent, {name: int(fs.size(root))}
    found = fs.find(root, detail=True)
    if not found:
        raise NotFound(f"{url} is neither a file nor a directory with files")
    prefix = f"{root}/"
    files = {path.removeprefix(prefix): int(each["size"]) for path, each in sorted(found.items())}
    if any(name.startswith(_DRAFT) for name in files):
        raise Incomplete(f"the conversion that wrote {url} did not finish: run it again, or remove this")
    return root, files


def _filesystem(url: str) -> tuple[Any, str]:
    if not url:
        raise StoreRefused("an empty text names no place: give a path or a URL like s3://bucket/prefix")
    url = os.path.expanduser(url.removeprefix("obstore+"))
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return fs, root.rstrip("/")


def _is_object_store(fs: Any) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(names & _OBJECT_STORES)


def _abandon(fs: Any, file: Any, partial: str) -> None:
    """Let go of a file that will not be finished: a client would finish it when the object is collected."""
    with suppress(Exception):
        file.close() if isinstance(fs, LocalFileSystem) else file.discard()
    with suppress(Exception):
        file.closed = True
    with suppress(Exception):
        fs.rm_file(partial)


def _read_local(path: Path, offset: int, row: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        while len(row):
            num_bytes = os.preadv(file.fileno(), [row], offset)
            if not num_bytes:
                raise Corrupt(f"{path} ended at {offset}, with {len(row)} bytes to come: it was cut short")
            row, offset = row[num_bytes:], offset + num_bytes


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what file systems and clients raise, each of its own kind, into errors of ours."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{what} is not there: {error}") from error
    except Exception as error:
        text = f"{what}: {type(error).__name__}: {error}"
        is_refused = isinstance(error, PermissionError | ImportError | ValueError | NotADirectoryError)
        if is_refused or type(error).__name__ in _REFUSED_TYPES:
            raise StoreRefused(f"{text}; check the URL and the credentials in the environment") from error
        raise StoreUnavailable(text) from error
