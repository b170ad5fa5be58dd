"""Directories of foreign files being written: whole and durable before they are seen, or never seen."""

import errno
import fcntl
import glob
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from checkpoint.engine.pipeline import Crew
from checkpoint.errors import (
    AlreadyExists,
    Conflict,
    FormatError,
    Incomplete,
    Mismatch,
    NotFound,
    StoreRefused,
)
from checkpoint.interop.place import DRAFT, Place, filesystem, told
from checkpoint.interop.turns import BEAT, BUSY, TURNS, Beat, Turn, taking_turn
from checkpoint.store.objects import ObjectStore
from checkpoint.store.wrappers import Retrying
from checkpoint.store.writeback import begin_writing

_PARTIAL = ".partial"
_ATTEMPT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_STRETCH_BYTES = 8 << 20
# Syncs that wait together share the file system's commits: one after the other they would pay for one each.
_NUM_SYNCERS = 8
_MOST_UNSYNCED = 64  # files: each holds a descriptor
# Their objects are there whole or not at all, and renaming one is copying it.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
_TAKEN = "{} exists: give a new one, nothing is overwritten"
_UNFINISHED = "{} holds what another conversion did not finish: remove it, or give a new one"
_LOCKLESS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_DISPROVED = (FormatError, Incomplete, Mismatch, NotFound)


class Draft:
    """A directory being written. Files that an earlier attempt of the same conversion finished are kept.

    Several threads may write files of it. `check` raises Conflict if somebody else writes it meanwhile.
    """

    def __init__(
        self,
        fs: Any,
        root: str,
        *,
        url: str,
        kept: frozenset[str],
        attempt: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._fs, self._root, self._url, self._attempt = fs, root, url, attempt
        self.kept = kept
        self.num_bytes = 0  # of the files that were written whole
        self._check = check
        self._lock = threading.Lock()
        self._syncing = _Syncing()

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """Write a file from its beginning; it is there only if the block ends without an error.

        On this machine it has its name once it is durable, which `settle` waits for.
        """
        self._check()
        target, what = f"{self._root}/{path}", f"{path} in {self._root}"
        is_local = isinstance(self._fs, LocalFileSystem)
        partial = target if _is_object_store(self._fs) else target + _PARTIAL
        with told(what):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            file: Any = open(partial, "wb") if is_local else self._fs.open(partial, "wb")  # noqa: SIM115 - below
        written = _Written(file, what, file.fileno() if is_local else None)
        try:
            yield cast(BinaryIO, written)
        except BaseException:
            _abandon(self._fs, file, partial)
            raise
        with self._lock:
            self.num_bytes += written.num_bytes
        with told(what):
            if is_local:
                self._syncing.add(lambda: _finish(file, partial, target, what))
                return
            file.flush()
            file.close()
            if partial != target:
                self._fs.mv(partial, target)

    def settle(self) -> None:
        """Wait until all files that were written are durable. Raises the first error of one."""
        self._syncing.settle()

    def place(self) -> Place:
        """Return what was written, to be read before anyone else can."""
        self.settle()
        return Place(self._url, self._attempt)

    @contextmanager
    def proving(self) -> Iterator[Place]:
        """Read back what was written. If it is wrong nothing of it is kept, and no attempt resumes it."""
        try:
            yield self.place()
        except _DISPROVED:
            self._discard()
            raise

    def _discard(self) -> None:
        with told(self._root):
            if isinstance(self._fs, LocalFileSystem):
                shutil.rmtree(self._root)
                return
            mark = f"{self._root}/{DRAFT}-{self._attempt}"
            for path in self._fs.find(self._root):
                if not path.endswith(mark) and f"/{TURNS}/" not in path:
                    self._fs.rm_file(path)
            self._fs.rm_file(mark)  # last, so that no reader ever believes what is left


class _Syncing:
    """Files on their way to the disk, while others are written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(_MOST_UNSYNCED)
        self._crew: Crew | None = None
        self._futures: list[Future[None]] = []

    def add(self, finish: Callable[[], None]) -> None:
        """Let a file be finished; waits while there are too many."""
        self._room.acquire()
        with self._lock:
            if self._crew is None:
                self._crew = Crew("sync", _NUM_SYNCERS)
            future = self._crew.submit(finish)
            self._futures.append(future)
        future.add_done_callback(lambda _: self._room.release())

    def settle(self) -> None:
        """Wait for all of them. Raises the first error."""
        with self._lock:
            crew, futures = self._crew, self._futures
            self._crew, self._futures = None, []
        if crew is not None:
            crew.close()
        for future in futures:
            future.result()


class _Written:
    """A file whose errors say which one it is, and whose disk begins while more is written."""

    def __init__(self, file: Any, what: str, descriptor: int | None) -> None:
        self._file, self._what, self._descriptor = file, what, descriptor
        self.num_bytes = self._begun = 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        with told(self._what):
            count = int(self._file.write(data))
            self.num_bytes += count
            if self._descriptor is not None and self.num_bytes - self._begun >= _STRETCH_BYTES:
                begin_writing(self._descriptor, self._begun, self.num_bytes - self._begun)
                self._begun = self.num_bytes
            return count

    def flush(self) -> None:
        """Do nothing: the end of the block does."""


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
    with told(url):
        fs, root = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with _drafting_here(fs, root, url, attempt) as draft:
            yield draft
        return
    if not _is_unfinished(found := _files(fs, root, url)) and found:
        raise AlreadyExists(_TAKEN.format(url))
    behind = url.removeprefix("obstore+").rpartition("::")[2]  # of a chain of clients, the last one's
    turns = Retrying(ObjectStore(f"{behind.rstrip('/')}/{TURNS}"))
    try:
        with taking_turn(turns, url, beat) as turn, _drafting_there(fs, root, url, attempt, turn) as draft:
            yield draft
    finally:
        for folder in (f"{root}/{TURNS}/.incoming", f"{root}/{TURNS}"):
            with suppress(Exception):  # there are no folders on object stores, and others' turns keep theirs
                fs.rmdir(folder)


@contextmanager
def _drafting_here(fs: Any, root: str, url: str, attempt: str) -> Iterator[Draft]:
    path = Path(os.path.realpath(root))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise AlreadyExists(_TAKEN.format(url))
    folder = path.with_name(f"{path.name}{DRAFT}-{attempt}")
    with told(url):
        for stale in path.parent.glob(f"{glob.escape(path.name)}{DRAFT}-*"):
            if stale != folder:
                with _held(stale, url):
                    shutil.rmtree(stale)
        folder.mkdir(parents=True, exist_ok=True)
    with _held(folder, url):
        with told(url):
            for partial in folder.rglob(f"*{_PARTIAL}"):
                partial.unlink()
            files = [one for one in folder.rglob("*") if one.is_file()]
        kept = frozenset(one.relative_to(folder).as_posix() for one in files)
        draft = Draft(fs, str(folder), url=str(folder), kept=kept, attempt=attempt)
        with _settled(draft):
            yield draft
        with told(url):
            for directory in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
                _sync(directory)
            if path.exists():
                path.rmdir()
            os.rename(folder, path)
            _sync(path.parent)


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
    if there and f"{DRAFT}-{attempt}" not in there:
        raise AlreadyExists((_UNFINISHED if _is_unfinished(there) else _TAKEN).format(url))
    with told(url):
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(mark, b"This conversion has not finished.\n")
    kept = frozenset(path for path in there if not path.startswith(DRAFT) and _PARTIAL not in path)
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


def _is_object_store(fs: Any) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(names & _OBJECT_STORES)


def _finish(file: Any, partial: str, target: str, what: str) -> None:
    """Make a file durable, and give it its name."""
    with told(what):
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        os.replace(partial, target)


def _abandon(fs: Any, file: Any, partial: str) -> None:
    """Let go of a file that will not be finished: a client would finish it when the object is collected."""
    with suppress(Exception):
        file.close() if isinstance(fs, LocalFileSystem) else file.discard()
    with suppress(Exception):
        file.closed = True
    with suppress(Exception):
        fs.rm_file(partial)


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
