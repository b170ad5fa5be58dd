"""Large buffers that are used again: to touch fresh memory costs several times what is done with it."""

import threading
import weakref

import numpy as np
import numpy.typing as npt

_POOLED_BYTES = (4 << 20) + (16 << 10)  # a block of the usual size, and its head
_LEAST_BYTES = 256 << 10  # smaller ones are had cheaply
_MAX_IDLE = 32

_lock = threading.Lock()
_idle: list[npt.NDArray[np.uint8]] = []


def scratch(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return memory with anything in it; it is used again once nobody refers to it or a view of it."""
    if not _LEAST_BYTES <= num_bytes <= _POOLED_BYTES:
        return np.empty(num_bytes, np.uint8)
    with _lock:
        whole = _idle.pop() if _idle else np.empty(_POOLED_BYTES, np.uint8)
    lent = np.frombuffer(whole.data, np.uint8, num_bytes)
    weakref.finalize(lent, _take_back, whole).atexit = False
    return lent


def let_idle_go() -> None:
    """Give the memory back that is not lent now: a restore is over."""
    with _lock:
        _idle.clear()


def _take_back(whole: npt.NDArray[np.uint8]) -> None:
    with _lock:
        if len(_idle) < _MAX_IDLE:
            _idle.append(whole)
