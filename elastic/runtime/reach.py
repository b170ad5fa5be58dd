"""The way to the driver's rendezvous store, for somebody who may be called off while on it.

torch's client tries a store that is gone for half a minute and more, and waits for one that hangs for ever,
whatever its timeout. So it is made only where something answers, and whoever still waits for an answer that
nobody wants any more is freed by shutting down the sockets.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from elastic.runtime.doors import find_closed
from elastic.runtime.sockets import Address, shut

REACH_S = 30.0
ANSWER_TIMEOUT = timedelta(seconds=30)
LOOK_S = 0.05
GRACE_S = 0.3
_TRY = timedelta(seconds=1)


def reach(address: Address, is_wanted: Callable[[], bool], wait: Callable[[float], None]) -> TCPStore:
    """Connect to the store. Raises ConnectionError if it does not answer in time, or is not wanted."""
    deadline = time.monotonic() + REACH_S
    while is_wanted():
        why = "nothing answers there"
        if find_closed({0: address}, is_wanted) == ():
            try:
                store = TCPStore(*address, is_master=False, timeout=_TRY)
                store.set_timeout(ANSWER_TIMEOUT)
                return store
            except RuntimeError as error:
                why = str(error)
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"the driver's rendezvous {address[0]}:{address[1]} was not reached in {REACH_S:g} s: {why}"
            )
        wait(LOOK_S)  # until it may answer
    raise ConnectionError("it is not wanted any more")


@contextmanager
def freed(address: Address, is_wanted: Callable[[], bool]) -> Iterator[None]:
    """Free whoever is in this context and waits for the store, once that is not wanted any more.

    Who sees it for himself within a moment keeps his connection.
    """
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            if not is_wanted() and not is_over.wait(GRACE_S):
                shut(frozenset({address}))

    lookout = threading.Thread(target=look, name="lookout", daemon=True)
    lookout.start()
    try:
        yield
    finally:
        is_over.set()
        lookout.join()  # the next world's store may have the same address
