"""This process's internet sockets, found by their addresses, whoever opened them: gloo and torch do not say.

A socket ends for the other side once no process holds it any more. So children that the job starts (the
workers of its DataLoader) must hold none of those whose end tells that this process is gone.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from weakref import WeakKeyDictionary

Address = tuple[str, int]
_MAPPED = "::ffff:"  # an IPv4 address, as torch's own sockets tell it
_private: WeakKeyDictionary[object, frozenset[Address]] = WeakKeyDictionary()


def listening() -> frozenset[Address]:
    """Return the addresses at which this process listens."""
    return frozenset(_address(one.getsockname()) for _, one in _sockets() if _is_listener(one))


def shut(addresses: frozenset[Address]) -> None:
    """Shut down the connected sockets that have one of these addresses at either end; never a listener (gloo
    would abort).
    """
    for _, one in _sockets():
        with suppress(OSError):
            if _ends(one) & addresses and not _is_listener(one):
                one.shutdown(socket.SHUT_RDWR)


def keep_private(owner: object, addresses: Iterable[Address]) -> None:
    """Keep sockets that have one of these addresses at either end from this process's children.

    What is forked from now on lets go of them; what is executed does not get those that are open by now.
    Holds until the owner names others, or is gone.
    """
    _private[owner] = mine = frozenset(addresses)
    for number, one in _sockets():
        with suppress(OSError):
            if _ends(one) & mine:
                fcntl.fcntl(number, fcntl.F_SETFD, fcntl.FD_CLOEXEC)


def _let_go() -> None:
    """Let go, in a child, of what is its parent's alone.

    Not by shutting down, which the parent would feel; and no number becomes free, for some object may still
    close it.
    """
    private = frozenset[Address]().union(*_private.values())
    with open(os.devnull, "r+b", buffering=0) as nothing:
        for number, one in _sockets():
            with suppress(OSError):
                if _ends(one) & private:
                    os.dup2(nothing.fileno(), number, inheritable=False)


os.register_at_fork(after_in_child=_let_go)


def _sockets() -> Iterator[tuple[int, socket.socket]]:
    """Yield the number and a duplicate of each internet socket this process holds; the caller's use ends with
    the iteration step.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6):
                yield int(name), copy


def _ends(one: socket.socket) -> set[Address]:
    ends = {_address(one.getsockname())}
    with suppress(OSError):  # it is not connected
        ends.add(_address(one.getpeername()))
    return ends


def _address(name: tuple[object, ...]) -> Address:
    host, port, *_ = name
    return (str(host).removeprefix(_MAPPED), int(str(port)))


def _is_listener(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
