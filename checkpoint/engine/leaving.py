"""A program that ends without closing what it opened: its newest snapshot is finished first, within a bound.

Daemon threads are cut off where they are when the interpreter ends, however it came to that: the end of the
script, `sys.exit`, an exception.
"""

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable

log = logging.getLogger("holdfast.checkpoint")

PATIENCE_S = 30.0  # of all together

Finish = Callable[[float], bool]  # waits for so long at most, and returns whether all was done

_finishes: list[tuple[int, weakref.WeakMethod[Finish]]] = []


def finish_at_exit(finish: Finish) -> None:
    """Call a method when the program ends, if its object still lives then; what came last goes first."""
    if not _finishes:
        atexit.register(_leave)
    _finishes[:] = [one for one in _finishes if one[1]() is not None]
    _finishes.append((os.getpid(), weakref.WeakMethod(finish)))


def _leave() -> None:
    deadline = time.monotonic() + PATIENCE_S
    for pid, method in reversed(_finishes):
        finish = method()
        if finish is None or pid != os.getpid():
            continue  # a forked child has none of the threads that it would wait for
        if not finish(max(deadline - time.monotonic(), 0.0)):
            log.error("the program ended before its newest checkpoint was safe: close() waits for that")
