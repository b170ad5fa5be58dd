"""The keeper's directory: private, locked by who looks for a keeper, removed when one ends in order."""

import fcntl
import os
import select
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoint.errors import KeeperLost
from checkpoint.keeper.settings import KeeperConfig

_POLL_S = 0.05
_KILL_S = 10.0
_PROBE_S = 2.0  # who asks whether a keeper lives holds its lock for a moment
_MODULE = b"checkpoint.keeper"


def make_private(directory: Path) -> None:
    """Create a directory that only this user can enter, in one that only this user can enter.

    Raises KeeperLost if either is somebody else's, open to others, or no real directory.
    """
    for path in (directory.parent, directory):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700, parents=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            wrong = "is no directory of its own"
        elif found.st_uid != os.getuid():
            wrong = "belongs to another user"
        elif stat.S_IMODE(found.st_mode) & 0o077:
            wrong = "is open to other users"
        else:
            continue
        raise KeeperLost(f"{path} {wrong}: remove it, or give the keeper another directory")


@contextmanager
def start_locked(config: KeeperConfig, deadline: float) -> Iterator[None]:
    """Hold the start lock, in the directory as it is by then: an ending keeper may remove it meanwhile."""
    while (fd := _lock_start(config)) is None:
        if time.monotonic() > deadline:
            raise KeeperLost(f"somebody has been starting a keeper in {config.home} for too long")
        time.sleep(_POLL_S)  # another client starts one, or looks for it
    try:
        yield
    finally:
        os.close(fd)


def hold_life_lock(config: KeeperConfig) -> int:
    """Make sure, for as long as this process lives, that it is the only keeper here; return the lock."""
    fd = _open(config.life_lock_path)
    deadline = time.monotonic() + _PROBE_S
    while not _try_lock(fd):
        if time.monotonic() > deadline:
            os.close(fd)
            raise KeeperLost(f"another keeper still lives in {config.home}")
        time.sleep(_POLL_S)  # somebody asks whether a keeper lives, with the lock in hand
    os.ftruncate(fd, 0)
    os.write(fd, str(os.getpid()).encode())
    return fd


def end_hung(config: KeeperConfig) -> int | None:
    """Kill the keeper that holds the life lock here; return its process id, None if none does.

    Only a process that was started as the keeper of this very directory is killed.
    """
    with suppress(OSError, ValueError):
        pid = int(config.life_lock_path.read_text())
        process = os.pidfd_open(pid)
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            directory = os.fsencode(config.home.resolve())
            if is_free(config) or _MODULE not in arguments or directory not in arguments:
                return None
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], _KILL_S)
            return pid
        finally:
            os.close(process)
    return None


def is_free(config: KeeperConfig) -> bool:
    """Whether no keeper lives here."""
    fd = _open(config.life_lock_path)
    try:
        return _try_lock(fd)
    finally:
        os.close(fd)


def remove_home(config: KeeperConfig, life_lock: int) -> None:
    """Remove the directory of a keeper that has ended in order, with its log.

    It stays if a client is at it, who waits for this keeper's end to start the next one there, or if it is
    not the one that this keeper lived in.
    """
    with suppress(OSError):  # swept away, or something of somebody else's in it
        start_lock = os.open(config.start_lock_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _try_lock(start_lock) and _lies_at(life_lock, config.life_lock_path):
                for path in (config.socket_path, config.log_path, config.life_lock_path):
                    path.unlink(missing_ok=True)
                config.start_lock_path.unlink()  # last: who misses it makes another, and rmdir fails
                config.home.rmdir()
        finally:
            os.close(start_lock)


def _lock_start(config: KeeperConfig) -> int | None:
    """Return the start lock; None while somebody holds it, or if it was removed on the way."""
    try:
        make_private(config.home)
        fd = _open(config.start_lock_path)
    except FileNotFoundError:
        return None
    if _try_lock(fd) and _lies_at(fd, config.start_lock_path):
        return fd
    os.close(fd)
    return None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lies_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
