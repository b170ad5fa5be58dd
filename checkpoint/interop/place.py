"""Directories of foreign files, wherever fsspec finds them: ranged reads, and writes whole or absent."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from checkpoint.errors import AlreadyExists, Corrupt, NotFound, StoreRefused, StoreUnavailable

_DRAFT = ".holdfast-draft"


class Place:
    """A directory that is only read: of this machine (a path, `file://`) or behind a URL that fsspec knows.

    A URL of a single file is a directory with that one file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with _told(url):
            self._fs, self._root = _filesystem(url)

    def __str__(self) -> str:
        return self.url

    @cached_property
    def files(self) -> Mapping[str, int]:
        """The size of each file, by its path below the directory. Raises NotFound if there is none."""
        with _told(self.url):
            found = self._fs.find(self._root, detail=True)
            single = self._fs.isfile(self._root)
        if not found:
            raise NotFound(f"{self.url} is neither a file nor a directory with files")
        if single:
            self._root, _, name = self._root.rpartition("/")
            return {name: int(next(iter(found.values()))["size"])}
        prefix = self._root.rstrip("/") + "/"
        return {path.removeprefix(prefix): int(each["size"]) for path, each in sorted(found.items())}

    def read(self, path: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
        """Return a range of a file, or all from an offset on. Raises NotFound, Corrupt if it is too short."""
        size = self._size(path)
        wanted = size - offset if num_bytes is None else num_bytes
        if offset < 0 or wanted < 0 or offset + wanted > size:
            raise Corrupt(
                f"{path} in {self.url} has {size} bytes, and should have {wanted} at {offset}: cut short"
            )
        if not wanted:
            return b""
        with _told(f"{path} in {self.url}"):
            local = self.local(path)
            if local is not None:
                return _read_local(local, offset, wanted)
            data = self._fs.cat_file(self._full(path), start=offset, end=offset + wanted)
        if len(data) != wanted:
            raise Corrupt(f"{len(data)} of {wanted} bytes at {offset} of {path} in {self.url} were read")
        return bytes(data)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading at any position."""
        self._size(path)
        with _told(f"{path} in {self.url}"):
            return cast(BinaryIO, self._fs.open(self._full(path), "rb"))

    def local(self, path: str) -> Path | None:
        """Return where a file lies on this machine, if it does: it can be mapped."""
        return Path(self._full(path)) if isinstance(self._fs, LocalFileSystem) else None

    def _size(self, path: str) -> int:
        try:
            return self.files[path]
        except KeyError:
            raise NotFound(f"there is no {path} in {self.url}") from None

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"


class Draft:
    """A directory being written. Files that an earlier attempt of the same conversion finished are kept."""

    def __init__(self, fs: Any, root: str, kept: frozenset[str]) -> None:
        self._fs, self._root = fs, root
        self.kept = kept

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """Write a file from its beginning; it is finished only when the block ends without an error."""
        target = f"{self._root}/{path}"
        is_local = isinstance(self._fs, LocalFileSystem)
        partial = f"{target}.partial" if is_local else target
        with _told(f"{path} in {self._root}"):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            file: Any = open(partial, "wb") if is_local else self._fs.open(partial, "wb")  # noqa: SIM115 - below
        try:
            yield cast(BinaryIO, file)
        except BaseException:
            with suppress(Exception):
                file.close() if is_local else file.discard()
            raise
        with _told(f"{path} in {self._root}"):
            file.flush()
            if is_local:
                os.fsync(file.fileno())
            file.close()
            if is_local:
                os.replace(partial, target)


@contextmanager
def drafting(url: str, attempt: str) -> Iterator[Draft]:
    """Write a new directory, whole or not at all; `attempt` identifies the conversion that is resumed.

    On this machine the directory is renamed into place at the end; where an error or a kill left a draft of
    the same attempt, its finished files are kept. Behind a URL each file lies where it belongs at once, and
    whoever writes has to write last what makes a reader believe them (an index, a metadata file).

    Raises AlreadyExists if something is there.
    """
    with _told(url):
        fs, root = _filesystem(url)
        root = root.rstrip("/")
        if not isinstance(fs, LocalFileSystem):
            if fs.exists(root) and fs.find(root):
                raise AlreadyExists(f"{url} exists: give a new one, nothing is overwritten")
            yield Draft(fs, root, frozenset())
            return
    path = Path(root)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise AlreadyExists(f"{url} exists: give a new one, nothing is overwritten")
    draft = path.with_name(f"{path.name}{_DRAFT}-{attempt}")
    for stale in path.parent.glob(f"{path.name}{_DRAFT}-*"):
        if stale != draft:
            shutil.rmtree(stale)
    with _told(url):
        draft.mkdir(parents=True, exist_ok=True)
    files = [one for one in draft.rglob("*") if one.is_file() and one.suffix != ".partial"]
    yield Draft(fs, str(draft), frozenset(str(one.relative_to(draft)) for one in files))
    with _told(url):
        for partial in draft.rglob("*.partial"):
            partial.unlink()
        if path.exists():
            path.rmdir()
        os.rename(draft, path)
        _sync(path.parent)


def _filesystem(url: str) -> tuple[Any, str]:
    if not url:
        raise StoreRefused("an empty text names no place: give a path or a URL like s3://bucket/prefix")
    fs, root = fsspec.core.url_to_fs(os.path.expanduser(url), use_listings_cache=False)
    return fs, root


def _read_local(path: Path, offset: int, num_bytes: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        parts = []
        while num_bytes:
            part = os.pread(file.fileno(), num_bytes, offset)
            if not part:
                raise Corrupt(f"{path} ended at {offset}, with {num_bytes} bytes to come: it was cut short")
            parts.append(part)
            offset, num_bytes = offset + len(part), num_bytes - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what file systems and clients raise into errors of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{what} is not there: {error}") from error
    except PermissionError as error:
        raise StoreRefused(f"{what} cannot be opened: {error}") from error
    except (OSError, ValueError, ImportError) as error:
        raise StoreUnavailable(f"{what}: {type(error).__name__}: {error}") from error
