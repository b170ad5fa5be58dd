"""A directory of foreign files being written: each file whole and durable before it has its name."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from checkpoint.engine.pipeline import Crew
from checkpoint.errors import FormatError, Incomplete, Mismatch, NotFound
from checkpoint.interop.place import DRAFT, Place, told
from checkpoint.interop.turns import TURNS
from checkpoint.store.writeback import begin_writing

NUM_THREADS = 2
PARTIAL = ".partial"
_STRETCH_BYTES = 8 << 20
# Syncs that wait together share the file system's commits: one after the other they would pay for one each.
_NUM_SYNCERS = 8
_MOST_UNSYNCED = 64  # files: each holds a descriptor
# Their objects are there whole or not at all, and renaming one is copying it.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
_DISPROVED = (FormatError, Incomplete, Mismatch, NotFound)


class Draft:
    """A directory being written. Files that an earlier attempt of the same conversion finished are kept.

    `num_threads` may write files of it at once, or read what goes into one. `check` raises Conflict if
    somebody else writes it meanwhile.
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
        self.num_threads = NUM_THREADS
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
        partial = target if _is_object_store(self._fs) else target + PARTIAL
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
