"""Where a directory of foreign files is written, and by whom: it is seen when it is whole, or never."""

import errno
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from checkpoint.errors import AlreadyExists, Conflict, StoreRefused
from checkpoint.format.keys import CONTROL, INDEX, MANIFESTS, PACKS
from checkpoint.interop.draft import PARTIAL, Draft
from checkpoint.interop.place import DRAFT, filesystem, told
from checkpoint.interop.turns import BEAT, BUSY, TURNS, Beat, Turn, taking_turn
from checkpoint.store.objects import ObjectStore
from checkpoint.store.paths import is_file_url
from checkpoint.store.wrappers import Retrying

_ATTEMPT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TAKEN = "{} exists: give a new one, nothing is overwritten"
_UNFINISHED = "{} holds what another conversion did not finish: remove it, or give a new one"
_FOLDERS = (MANIFESTS, PACKS, INDEX, CONTROL)  # a store's
_LOCKLESS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def drafting(url: str, attempt: str, beat: Beat = BEAT) -> Iterator[Draft]:
    """Write a new directory, whole or not at all; `attempt` identifies the conversion that is resumed.

    On this machine the directory is renamed into place at the end, when all of it is durable. Behind a URL
    each file lies where it belongs at once, and until the end an object says that they are a draft, which no
    reader then believes. Where an error or a kill left a draft of the same attempt, its files are kept.
    Here the kernel lets go of a killed writer's draft at once, behind a URL it takes the `beat`'s silence.

    Raises AlreadyExists if something else is there, Conflict if another conversion is just writing it.
    """
    if not _ATTEMPT.fullmatch(attempt):
        raise StoreRefused(f"an attempt is called by letters and digits, not {attempt!r}")
    check_apart(url)
    with told(url):
        fs, root = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with _drafting_here(fs, root, url, attempt) as draft:
            yield draft
        return
    _check_free_there(fs, root, url)
    behind = url.removeprefix("obstore+").rpartition("::")[2]  # of a chain of clients, the last one's
    turns = Retrying(ObjectStore(f"{behind.rstrip('/')}/{TURNS}"))
    try:
        with taking_turn(turns, url, beat) as turn, _drafting_there(fs, root, url, attempt, turn) as draft:
            yield draft
    finally:
        for folder in (f"{root}/{TURNS}/.incoming", f"{root}/{TURNS}"):
            with suppress(Exception):  # there are no folders on object stores, and others' turns keep theirs
                fs.rmdir(folder)


def check_free(url: str, attempt: str) -> None:
    """See that a directory can be written, as far as that shows without writing.

    Raises AlreadyExists if something else is there, behind a URL another attempt's draft as well;
    StoreRefused if there can be no directory here.
    """
    check_apart(url)
    with told(url):
        fs, root = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        _check_free_here(Path(os.path.realpath(root)), url)
    else:
        _check_resumable(_files(fs, root, url), url, attempt)


def _check_free_here(path: Path, url: str) -> None:
    with told(url):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise AlreadyExists(_TAKEN.format(url))
        _check_writable(next(one for one in path.parents if one.exists()), url)


def check_apart(url: str) -> None:
    """See that a directory does not lie among a store's objects, where its prune would delete it."""
    if "://" in url and not is_file_url(url) and not {f"{part}/" for part in url.split("/")} & {*_FOLDERS}:
        return  # without asking anybody
    with told(url):
        fs, root = filesystem(url)
        path = PurePosixPath(os.path.realpath(root) if isinstance(fs, LocalFileSystem) else root)
        for inner in (path, *path.parents):
            if f"{inner.name}/" in _FOLDERS and fs.exists(f"{inner.parent}/{MANIFESTS}"):
                raise StoreRefused(
                    f"{url} lies within the store in {inner.parent}, which may delete it: give another place"
                )


def check_possible(url: str) -> None:
    """See that a directory of this machine is there, or can be made. Raises StoreRefused."""
    with told(url):
        path = Path(os.path.realpath(filesystem(url)[1]))
        _check_writable(next(one for one in (path, *path.parents) if one.exists()), url)


def _check_writable(folder: Path, url: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StoreRefused(f"{url} cannot be made: {folder} is no directory that can be written to")


def _check_resumable(there: set[str], url: str, attempt: str) -> None:
    if there and f"{DRAFT}-{attempt}" not in there:
        raise AlreadyExists((_UNFINISHED if _is_unfinished(there) else _TAKEN).format(url))


def _check_free_there(fs: Any, root: str, url: str) -> None:
    if not _is_unfinished(found := _files(fs, root, url)) and found:
        raise AlreadyExists(_TAKEN.format(url))


@contextmanager
def _drafting_here(fs: Any, root: str, url: str, attempt: str) -> Iterator[Draft]:
    path = Path(os.path.realpath(root))
    _check_free_here(path, url)
    folder = path.with_name(f"{path.name}{DRAFT}-{attempt}")
    with told(url):
        for stale in path.parent.glob(f"{glob.escape(path.name)}{DRAFT}-*"):
            if stale != folder:
                with _held(stale, url):
                    shutil.rmtree(stale)
        _make(folder, url)
    with _held(folder, url):
        with told(url):
            for partial in folder.rglob(f"*{PARTIAL}"):
                partial.unlink()
            files = [one for one in folder.rglob("*") if one.is_file()]
        kept = frozenset(one.relative_to(folder).as_posix() for one in files)
        draft = Draft(fs, str(folder), url=str(folder), kept=kept, attempt=attempt)
        try:
            with _settled(draft):
                yield draft
        except BaseException:
            with suppress(OSError):
                folder.rmdir()  # nothing in it is worth to be kept
            raise
        with told(url):
            for directory in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
                _sync(directory)
            _put_in_place(folder, path, url)


def _put_in_place(folder: Path, path: Path, url: str) -> None:
    """Rename a finished draft. Raises AlreadyExists if something came to be there meanwhile."""
    try:
        if path.exists():
            path.rmdir()
        os.rename(folder, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        shutil.rmtree(folder)
        raise AlreadyExists(_TAKEN.format(url)) from None
    _sync(path.parent)


def _make(folder: Path, url: str) -> None:
    """Make a directory, and those above it. Raises StoreRefused where the kernel makes none, as in /proc."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise StoreRefused(f"{url} cannot be written: no directory can be made in {folder.parent}") from None


@contextmanager
def _held(folder: Path, url: str) -> Iterator[None]:
    """Keep others from a draft, as long as this process lives. Raises Conflict if somebody else has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise Conflict(BUSY.format(url)) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(BUSY.format(url)) from None
        except OSError as error:  # file systems that cannot lock a directory leave it to people
            if error.errno not in _LOCKLESS:
                raise
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise Conflict(BUSY.format(url))  # it was finished or swept away before it was locked
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _drafting_there(fs: Any, root: str, url: str, attempt: str, turn: Turn) -> Iterator[Draft]:
    mark = f"{root}/{DRAFT}-{attempt}"
    there = _files(fs, root, url)  # once more, for who had the turn before may have finished
    _check_resumable(there, url, attempt)
    with told(url):
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(mark, b"This conversion has not finished.\n")
    kept = frozenset(path for path in there if not path.startswith(DRAFT) and PARTIAL not in path)
    yield Draft(fs, root, url=url, kept=kept, attempt=attempt, check=turn.check)
    turn.show()
    with told(url):
        fs.rm_file(mark)


def _files(fs: Any, root: str, url: str) -> set[str]:
    """Return the files that lie behind a URL, but for those that tell whose turn it is."""
    with told(url):
        found = fs.find(root) if fs.exists(root) else []
    files = {path.removeprefix(f"{root}/") for path in found if path.startswith(f"{root}/")}
    return {path for path in files if not path.startswith(f"{TURNS}/")}


def _is_unfinished(files: Iterable[str]) -> bool:
    return any(path.startswith(DRAFT) for path in files)


@contextmanager
def _settled(draft: Draft) -> Iterator[None]:
    """Let files under way become durable before the block is left, in whichever way that is."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error is the one to be told
            draft.settle()
        raise
    draft.settle()


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
