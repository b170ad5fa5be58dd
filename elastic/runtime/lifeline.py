"""Lifelines: silent sockets from members to their driver; one that ends tells that its process is gone.

The kernel closes a killed process's sockets at once, so the driver knows within milliseconds; Ray needs some
hundred. A host that vanishes closes nothing: that is Ray's and the silence's to find. A member that follows
another driver says so before it lets go: it is not lost, though to this driver it is gone.
"""

import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from elastic.runtime.sockets import keep_private

_MAX_HELLO_BYTES = 256
_MOVED = b"moved\n"
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where a driver waits for lifelines, and the word that says who may hold one."""

    host: str
    port: int
    token: str


class Lifelines:
    """The driver's side: a thread that calls `lost(member)` when a member's lifeline ends."""

    def __init__(self, host: str, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._listener = socket.create_server((host, 0), backlog=1024)
        self.anchor = Anchor(host, int(self._listener.getsockname()[1]), secrets.token_hex(16))
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="lifelines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let go of all lifelines, without calling anybody lost."""
        self._waker.close()
        self._thread.join()

    def _watch(self) -> None:
        members: dict[socket.socket, bytes] = {}  # what each has said so far
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakened, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    one = key.fileobj
                    if one is self._wakened:
                        for each in (*members, self._listener, self._wakened):
                            each.close()
                        return
                    if one is self._listener:
                        self._accept(selector, members)
                    elif isinstance(one, socket.socket) and not self._hear(one, members):
                        selector.unregister(one)
                        one.close()

    def _accept(self, selector: selectors.BaseSelector, members: dict[socket.socket, bytes]) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            members[connection] = b""
            selector.register(connection, selectors.EVENT_READ)

    def _hear(self, one: socket.socket, members: dict[socket.socket, bytes]) -> bool:
        """Read what a lifeline says; return whether it goes on."""
        try:
            said = one.recv(_MAX_HELLO_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            said = b""
        if said and len(members[one]) <= _MAX_HELLO_BYTES:
            members[one] += said
            return True
        hello, _, farewell = members.pop(one).partition(b"\n")
        token, _, member = hello.decode(errors="replace").partition(" ")
        if (
            member
            and farewell != _MOVED
            and secrets.compare_digest(token.encode(), self.anchor.token.encode())
        ):
            self._lost(member)
        return False


class Lifeline:
    """The member's side: one socket, to the driver that gave the newest order."""

    def __init__(self, member: str) -> None:
        self._member = member
        self._anchor: Anchor | None = None
        self._socket: socket.socket | None = None

    def hold(self, anchor: Anchor) -> None:
        """Connect to a driver, unless that is done. Without a connection Ray still tells of a death."""
        if anchor == self._anchor:
            return
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(_MOVED)
        self.let_go()
        keep_private(self, [(anchor.host, anchor.port)])
        with suppress(OSError):
            self._socket = socket.create_connection((anchor.host, anchor.port), _CONNECT_S)
            self._socket.sendall(f"{anchor.token} {self._member}\n".encode())
            self._anchor = anchor

    def let_go(self) -> None:
        """Tell the driver that this member is gone."""
        if self._socket is not None:
            self._socket.close()
            self._socket = self._anchor = None
