"""Doors: plain listening sockets at which members knock, to find out whom they can reach.

gloo's own sockets are left alone, as a connection that says nothing may make it abort. Nobody has to open a
door: the kernel answers for a process that lives, however busy its threads are.
"""

import errno
import selectors
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice

from elastic.runtime.sockets import Address

ANSWER_S = 0.5
_LOOK_S = 0.02
_AT_ONCE = 256  # sockets that are open at once


class Door:
    """One member's door, for its whole life."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), backlog=1024)
        self._socket.setblocking(False)
        weakref.finalize(self, self._socket.close)
        host, port = self._socket.getsockname()[:2]
        self.address: Address = (str(host), int(port))

    def clear(self) -> None:
        """Let go of those who have knocked, so that there is room for others."""
        with suppress(OSError):
            while True:
                self._socket.accept()[0].close()


def find_closed(
    doors: Mapping[int, Address], is_wanted: Callable[[], bool], answer_s: float = ANSWER_S
) -> tuple[int, ...] | None:
    """Knock at doors, many at once; return whose do not answer in time, in order. None if that is not wanted
    any more.
    """
    left, closed = iter(doors.items()), set[int]()
    while some := dict(islice(left, _AT_ONCE)):
        unanswered = _knock(some, is_wanted, answer_s)
        if unanswered is None:
            return None
        closed |= unanswered
    return tuple(sorted(closed))


def _knock(doors: Mapping[int, Address], is_wanted: Callable[[], bool], answer_s: float) -> set[int] | None:
    closed, deadline = set(doors), time.monotonic() + answer_s
    with selectors.DefaultSelector() as selector:
        try:
            for rank, address in doors.items():
                _start(selector, rank, address)
            while selector.get_map() and time.monotonic() < deadline:  # for answers
                if not is_wanted():
                    return None
                closed -= set(_answered(selector))
        finally:
            for key in list(selector.get_map().values()):
                _close(selector, key.fileobj)
    return closed


def _start(selector: selectors.BaseSelector, rank: int, address: Address) -> None:
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    one.setblocking(False)
    if one.connect_ex(address) in (0, errno.EINPROGRESS):
        selector.register(one, selectors.EVENT_WRITE, rank)
    else:
        one.close()


def _answered(selector: selectors.BaseSelector) -> Iterator[int]:
    """Yield who has answered by now; who refused is done, too."""
    for key, _ in selector.select(_LOOK_S):
        if isinstance(key.fileobj, socket.socket) and not key.fileobj.getsockopt(
            socket.SOL_SOCKET, socket.SO_ERROR
        ):
            yield int(key.data)
        _close(selector, key.fileobj)


def _close(selector: selectors.BaseSelector, one: object) -> None:
    if isinstance(one, socket.socket):
        selector.unregister(one)
        one.close()
