"""The trainer's side of the keeper: joins the one that lives or starts one, and replaces one that died."""

import logging
import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue

from checkpoint.engine.arena import map_arena
from checkpoint.engine.contract import Failed, Outcome, SnapshotPlan, Ticket
from checkpoint.errors import ArenaFull, KeeperLost, Mismatch
from checkpoint.keeper.home import is_free, start_locked
from checkpoint.keeper.launch import launch
from checkpoint.keeper.messages import (
    Message,
    outcome_from_wire,
    plan_to_wire,
    receive,
    receive_with_fd,
    send,
    ticket_to_wire,
)
from checkpoint.keeper.settings import KeeperConfig

log = logging.getLogger("holdfast.keeper")

_HELLO_S = 10.0
_REPLY_S = 60.0
_POLL_S = 0.05
_STREAM_BYTES = 4 << 20  # chunks are announced in batches of about this size


def connect(config: KeeperConfig) -> "KeeperHost":
    """Join the keeper of this run and host, or start it.

    Raises StoreUnavailable, ArenaFull or KeeperLost, saying what to do, if there is none and none can be
    started.
    """
    return KeeperHost(config)


class KeeperHost:
    """A host kept by a keeper process.

    When that dies, what it had not made durable is reported as Failed, and the next `open` goes to a new one.
    Calls come from one capture thread; `outcomes` may come from another.
    """

    def __init__(self, config: KeeperConfig) -> None:
        self._config = config
        self._link = _join_or_start(config)
        self._captured: dict[tuple[int, int], bool] = {}  # without outcome yet; whether the keeper took it
        self._unannounced: list[int] = []
        self._unannounced_bytes = 0
        self._slot_bytes: tuple[int, ...] = ()

    def open(self, ticket: Ticket, plan: SnapshotPlan) -> memoryview | None:
        """Lend arena space for a share, as `Host.open` says; starts a new keeper if the last one died."""
        if self._link.is_lost:
            log.warning("the keeper of host %s is gone: starting another", self._config.host)
            lost, self._link = self._link, _join_or_start(self._config)
            self._link.news.extend([*lost.news, *self._losses()])
        self._slot_bytes = tuple(slot.num_bytes for slot in plan.slots)
        self._unannounced, self._unannounced_bytes = [], 0
        request = {"verb": "open", "ticket": ticket_to_wire(ticket), "plan": plan_to_wire(plan)}
        reply = self._link.ask(request, plan.handling.max_wait_s + _REPLY_S)
        if "arena_full" in reply:
            raise ArenaFull(reply["arena_full"])
        if "error" in reply:
            raise Mismatch(f"the keeper refused step {ticket.step}: {reply['error']}")
        if reply["region"] is None:
            return None
        offset, num_bytes = reply["region"]
        return self._link.memory[offset : offset + num_bytes]

    def ready(self, ticket: Ticket, chunk_index: int) -> None:
        """Say that a slot's bytes are in; told in batches."""
        self._unannounced.append(chunk_index)
        self._unannounced_bytes += self._slot_bytes[chunk_index]
        if self._unannounced_bytes >= _STREAM_BYTES:
            self._link.tell({"verb": "ready", "ticket": ticket_to_wire(ticket), "chunks": self._unannounced})
            self._unannounced, self._unannounced_bytes = [], 0

    def seal(self, ticket: Ticket) -> None:
        """Say that the share is captured; from now on the keeper makes it durable, whatever happens here."""
        key = (ticket.generation, ticket.step)
        self._captured[key] = False  # its outcome may come before the reply
        self._link.ask({"verb": "seal", "ticket": ticket_to_wire(ticket)}, _REPLY_S)
        if key in self._captured:
            self._captured[key] = True

    def spoil(self, ticket: Ticket, why: str) -> None:
        """Say that the share must not be used."""
        self._link.ask({"verb": "spoil", "ticket": ticket_to_wire(ticket), "why": why}, _REPLY_S)

    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what became known since this was last asked."""
        is_lost = self._link.is_lost  # first this: what was told before the end is in `news` by then
        taken = []
        while self._link.news:
            outcome = self._link.news.popleft()
            self._captured.pop((outcome.generation, outcome.step), None)
            taken.append(outcome)
        return (*taken, *self._losses()) if is_lost else tuple(taken)

    def close(self) -> None:
        """Leave the keeper. What was captured goes on to be durable."""
        self._link.close()

    def __enter__(self) -> "KeeperHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _losses(self) -> list[Outcome]:
        """Report (once) what a keeper that died had captured and did not report durable."""
        lost: list[Outcome] = []
        while self._captured:
            (generation, step), was_taken = self._captured.popitem()
            if was_taken:  # else its capture is tried again
                why = "the keeper died before the checkpoint was durable; the next save goes to a new keeper"
                lost.append(Failed(step, generation, why))
        return lost


class _Link:
    """One connection. A thread reads it: replies go to who asked, outcomes to `news`; its end is noticed."""

    def __init__(self, channel: socket.socket) -> None:
        hello, fd = receive_with_fd(channel)
        if fd is None:
            raise KeeperLost("the keeper did not hand its arena over")
        try:
            self.memory = memoryview(map_arena(fd, hello["arena_bytes"]))
        finally:
            os.close(fd)
        self.news: deque[Outcome] = deque()
        self.is_lost = False
        self._channel = channel
        self._asking = threading.Lock()
        self._sending = threading.Lock()
        self._replies: SimpleQueue[Message | None] = SimpleQueue()
        self._num_asked = 0
        channel.settimeout(None)
        threading.Thread(target=self._read, name="holdfast-keeper", daemon=True).start()

    def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a message and wait for its reply. Raises KeeperLost when there will be none."""
        with self._asking:
            self._num_asked += 1
            self.tell({**message, "id": self._num_asked})
            while True:
                try:
                    reply = self._replies.get(timeout=timeout_s)
                except Empty:
                    self.close()
                    raise KeeperLost(f"the keeper did not answer within {timeout_s:.0f} s") from None
                if reply is None:
                    raise KeeperLost("the keeper died")
                if reply["id"] == self._num_asked:
                    return reply

    def tell(self, message: Message) -> None:
        """Send a message that has no reply."""
        if self.is_lost:
            raise KeeperLost("the keeper died")
        with self._sending:
            send(self._channel, message)

    def close(self) -> None:
        """End the connection."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            while True:
                message = receive(self._channel)
                if "outcome" in message:
                    self.news.append(outcome_from_wire(message["outcome"]))
                else:
                    self._replies.put(message)
        except KeeperLost:
            self.is_lost = True
            self._replies.put(None)
            self._channel.close()


def _join_or_start(config: KeeperConfig) -> _Link:
    """Find a living keeper or start one; a lock sees to it that one client does so at a time."""
    deadline = time.monotonic() + config.start_s
    with start_locked(config, deadline):
        while True:
            with suppress(KeeperLost, OSError):
                return _dial(config)
            if time.monotonic() > deadline:
                raise KeeperLost(
                    f"a keeper (process {_pid(config)}) holds {config.home} and does not answer: "
                    f"end it, or see {config.log_path}"
                )
            if is_free(config):
                log.info("started keeper %d of host %s", launch(config), config.host)
            else:
                time.sleep(_POLL_S)  # it is about to end


def _dial(config: KeeperConfig) -> _Link:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.settimeout(_HELLO_S)
        channel.connect(str(config.socket_path))
        return _Link(channel)
    except (OSError, KeeperLost):
        channel.close()
        raise


def _pid(config: KeeperConfig) -> str:
    with suppress(OSError):
        return config.life_lock_path.read_text()
    return "?"
