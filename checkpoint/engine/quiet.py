"""No garbage collection in the middle of a save.

A save makes some objects for each tensor, none of which outlives it by much. A collection meanwhile would
promote them all, and their number would bring on a full one every few saves: a tenth of a second and more in
the training thread, for nothing, because none of them lies in a cycle.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Put collections off for a few milliseconds; nothing changes if they are off already."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
