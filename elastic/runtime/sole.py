"""One driver of a run on one machine: who drives it holds a lock, which nothing it has forked holds on to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

from elastic.errors import Fenced
from elastic.runtime.order import TrainOrder

_held: set[FileIO] = set()


@contextmanager
def sole_driver(order: TrainOrder) -> Iterator[None]:
    """Hold the run's lock, so that two drivers on one machine do not fight over it. Raises Fenced."""
    order.run_dir.mkdir(parents=True, exist_ok=True)
    with FileIO(order.run_dir / "driver.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fenced(
                f"another process on this machine is already driving run {order.run}; stop it first"
            ) from None
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


def _let_go() -> None:
    """Let go of the locks in a child: it would keep them from a successor when its parent is dead."""
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
