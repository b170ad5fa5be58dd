"""Where a world's collectives run beside the training: a thread of their own, on CUDA a stream of its own.

Whatever runs there ends once the world is cut: `close` waits for that, so that what the work used can be used
again. Broken is kept until somebody joins.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import torch

from elastic.training.ports import Broken

Work = Callable[[], None]
CLOSE_TIMEOUT_S = 10.0
POLL_S = 0.001


class Lane(Protocol):
    """Runs work in the order in which it was started."""

    def start(self, work: Work) -> None:
        """Run it beside the caller; not at all if something before was Broken."""

    def join(self) -> None:
        """Wait until all of it is done. Raises what broke it."""

    def close(self) -> None:
        """Drop what has not begun, and wait until the rest has ended."""


class ThreadLane:
    """Runs work in a thread of its own, that begins with the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._error: Exception | None = None

    def start(self, work: Work) -> None:
        """Queue it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, name="collectives", daemon=True)
            self._thread.start()
        self._queue.put(work)

    def join(self) -> None:
        """Wait for the queue's present end."""
        if self._thread is None:
            return
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait()
        _raise_anew(self._error)

    def close(self) -> None:
        """End the thread; its world has been cut, so that nothing in it blocks."""
        self._is_closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                raise TimeoutError(
                    f"a collective has not ended {CLOSE_TIMEOUT_S:g} s after its world was cut"
                )

    def _live(self) -> None:
        while (work := self._queue.get()) is not None:
            if isinstance(work, threading.Event):
                work.set()
            elif self._error is None and not self._is_closed:
                self._error = _run(work)
            del work  # it refers to the world, which must be gone when it was left


class StreamLane:
    """Queues work on a CUDA stream of its own: the host goes on, the device does both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._error: Exception | None = None

    def start(self, work: Work) -> None:
        """Queue it behind what the device was told up to now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._error = self._error or _run(work)

    def join(self) -> None:
        """Let the device's present stream wait."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        _raise_anew(self._error)

    def close(self) -> None:
        """Wait until the stream is empty; its communicator has been aborted."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while not self._stream.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the device still computes {CLOSE_TIMEOUT_S:g} s after the abort")
            time.sleep(POLL_S)  # `synchronize` has no timeout


def _run(work: Work) -> Exception | None:
    """Return what it raised, without the frames that hold on to the world."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  (whatever it is, it is raised again by `join`)
        return error.with_traceback(None)
    return None


def _raise_anew(error: Exception | None) -> None:
    if isinstance(error, Broken):
        raise Broken(error.generation, error.why)
    if error is not None:
        raise error
