"""One heap for all threads: what one of them gave back, the next one gets, and a process grows no further."""

import ctypes
import sys

_ARENA_MAX = -8  # M_ARENA_MAX, of malloc.h


def share_heap() -> None:
    """Let all threads of this process allocate from one heap, where the C library is glibc.

    It would give each its own, of which it keeps what is freed: several times what is held at any moment.
    Has no effect once there are many heaps, so call it early.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # other C libraries have no such thing, or one that does nothing
            mallopt(_ARENA_MAX, 1)
