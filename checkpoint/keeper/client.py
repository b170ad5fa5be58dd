"""The trainer's side of the keeper: joins the one that lives or starts one, and replaces one that died."""

import logging
import mmap
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from weakref import WeakSet

from checkpoint.engine.arena import Region, map_arena, populate
from checkpoint.engine.contract import Failed, Outcome, Pressure, SnapshotPlan, Ticket, is_final
from checkpoint.engine.held import Held
from checkpoint.errors import CheckpointError, KeeperBusy, KeeperLost, Mismatch, StoreRefused
from checkpoint.keeper.home import end_hung, is_free, start_locked
from checkpoint.keeper.launch import as_told, launch
from checkpoint.keeper.messages import (
    Message,
    held_from_wire,
    outcome_from_wire,
    plan_to_wire,
    receive,
    receive_with_fd,
    send,
    ticket_to_wire,
    timeval,
)
from checkpoint.keeper.peering.policy import (
    Addresses,
    PeerPolicy,
    addresses_to_json,
    parse_addresses,
    policy_to_json,
)
from checkpoint.keeper.settings import KeeperConfig, config_to_text

log = logging.getLogger("holdfast.keeper")

_POLL_S = 0.05
_BUSY_S = 5.0  # a trainer that was replaced may take a moment to be gone
_MAX_FAILED = 3  # keepers that do not come up, one after the other
_POPULATED_BYTES = 8 << 20  # at a time
_STREAM_BYTES = 4 << 20  # chunks are announced in batches of about this size
_channels: WeakSet[socket.socket] = WeakSet()


def connect(config: KeeperConfig) -> "KeeperHost":
    """Join the keeper of this run and host, or start it.

    Raises StoreUnavailable, ArenaFull or KeeperLost, saying what to do, if there is none and none can be
    started; KeeperBusy if there is one that others use with other settings.
    """
    return KeeperHost(config)


class KeeperHost:
    """A host kept by a keeper process.

    When that dies, what it had not made durable is reported as Failed, and the next `open` goes to a new one.
    So when it hangs: a keeper that does not answer for `KeeperConfig.answer_s` is killed. Calls come from one
    capture thread; `outcomes`, `held` and `pressure` may come from others.
    """

    def __init__(self, config: KeeperConfig) -> None:
        self._config = config
        self._link = _join_or_start(config)
        self._captured: dict[tuple[int, int], bool] = {}  # without outcome yet; whether the keeper took it
        self._stored: set[tuple[int, int]] = set()  # those of depth "store": memory's news is not all of them
        self._unannounced: list[int] = []
        self._unannounced_bytes = 0
        self._slot_bytes: tuple[int, ...] = ()
        self._plan: SnapshotPlan | None = None  # the last one that this keeper was told

    def open(self, ticket: Ticket, plan: SnapshotPlan) -> memoryview | None:
        """Lend arena space for a share, as `Host.open` says; starts a new keeper if the last one died."""
        if self._link.is_lost:
            log.warning("the keeper of host %s is gone: starting another", self._config.host)
            if self._link.is_hung:
                _end_hung(self._config)
            lost, self._link, self._plan = self._link, _join_or_start(self._config), None
            self._link.news.extend([*lost.news, *self._losses()])
        if self._plan is None or self._plan.slots is not plan.slots:
            self._slot_bytes = tuple(slot.num_bytes for slot in plan.slots)
        self._unannounced, self._unannounced_bytes = [], 0
        told = plan_to_wire(plan, self._plan)
        reply = self._link.ask({"verb": "open", "ticket": ticket_to_wire(ticket), "plan": told})
        self._plan = plan
        if "error" in reply:
            raise Mismatch(f"the keeper refused step {ticket.step}: {reply['error']}")
        if reply["region"] is None:
            self._link.news.extend(map(outcome_from_wire, filter(None, [reply["over"]])))
            return None
        offset, num_bytes = reply["region"]
        return self._link.mapped(reply["arena_bytes"])[offset : offset + num_bytes]

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
        if self._plan is not None and self._plan.handling.depth == "store":
            self._stored.add(key)
        reply = self._link.ask({"verb": "seal", "ticket": ticket_to_wire(ticket)})
        if "error" in reply:
            self._captured.pop(key, None)
            raise Mismatch(f"the keeper refused step {ticket.step}: {reply['error']}")
        if key in self._captured:
            self._captured[key] = True

    def spoil(self, ticket: Ticket, why: str) -> None:
        """Say that the share must not be used."""
        self._link.ask({"verb": "spoil", "ticket": ticket_to_wire(ticket), "why": why})

    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what became known since this was last asked."""
        is_lost = self._link.is_lost  # first this: what was told before the end is in `news` by then
        taken = []
        while self._link.news:
            outcome = self._link.news.popleft()
            key = (outcome.generation, outcome.step)
            if is_final(outcome, "store" if key in self._stored else "memory"):
                self._captured.pop(key, None)
                self._stored.discard(key)
            taken.append(outcome)
        return (*taken, *self._losses()) if is_lost else tuple(taken)

    @contextmanager
    def held(self) -> Iterator[Held | None]:
        """Pin and return the newest snapshot that is held whole, as `Memory.held` says.

        None if the keeper is gone as well. If it goes while its memory is read, that stays as it is.
        """
        link, told = self._link, None
        with suppress(KeeperLost):
            told = link.ask({"verb": "held"})
        if told is None or told.get("held") is None:
            yield None
            return
        try:
            yield held_from_wire(told["held"], link.mapped(told["arena_bytes"]).toreadonly())
        finally:
            with suppress(KeeperLost):
                link.ask({"verb": "unheld"})

    def settle(self, above: int, timeout_s: float, *, patience_s: float) -> tuple[int, ...]:
        """Wait until what the keeper has under way above a step is over, as `Intake.settle` says.

        Returns nothing if the keeper is gone: then nobody writes.
        """
        with suppress(KeeperLost):
            told = {"verb": "settle", "above": above, "timeout_s": timeout_s, "patience_s": patience_s}
            return tuple(self._link.ask(told).get("steps", ()))
        return ()

    def pressure(self) -> Pressure:
        """Return how tight the keeper's memory has been so far. Raises KeeperLost."""
        return Pressure(**self._link.ask({"verb": "pressure"})["pressure"])

    @property
    def keeper(self) -> object:
        """Stands for the keeper that is joined now: another one's is another object."""
        return self._link

    def listen(self, policy: PeerPolicy) -> Addresses:
        """Have the keeper listen to the keepers of other hosts; return whom it knows, itself among them.

        Raises KeeperLost; StoreRefused if its machine has no such address.
        """
        reply = self._link.ask({"verb": "listen", "policy": policy_to_json(policy)})
        if "error" in reply:
            raise StoreRefused(f"the keeper of {self._config.host} cannot be a peer: {reply['error']}")
        return parse_addresses(reply["peers"])

    def peers(self) -> Addresses:
        """Return the keepers that this one knows, itself among them if it listens; none if it died."""
        with suppress(KeeperLost):
            return parse_addresses(self._link.ask({"verb": "peers"})["peers"])
        return {}

    def meet(self, generation: int, addresses: Addresses) -> None:
        """Tell the keeper the keepers of a generation's world, the first rank's first. Raises KeeperLost."""
        told = addresses_to_json(addresses)
        self._link.ask({"verb": "meet", "generation": generation, "peers": told})

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
            self._stored.discard((generation, step))
            if was_taken:  # else its capture is tried again
                why = "the keeper died before the checkpoint was durable; the next save goes to a new keeper"
                lost.append(Failed(step, generation, why))
        return lost


class _Link:
    """One connection. A thread reads it: replies go to who asked, outcomes to `news`; its end is noticed.

    A keeper that does not answer for `answer_s`, nor says that it is busy, is hung: the link is given up.
    """

    def __init__(self, channel: socket.socket, config: KeeperConfig) -> None:
        send(channel, {"hello": config_to_text(config)})
        greeting, fd = receive_with_fd(channel)
        if "error" in greeting:
            raise as_told(greeting)
        if fd is None:
            raise KeeperLost(f"the keeper did not hand its arena over: {greeting.get('leaving')}")
        answer_s = config.answer_s
        self._arena_fd = fd
        self._mapping = threading.Lock()
        self._memory = memory = map_arena(fd, greeting["arena_bytes"])
        self.news: deque[Outcome] = deque()
        self.is_lost = False
        self.is_hung = False
        self._answer_s = answer_s
        self._heard_s = time.monotonic()
        self._channel = channel
        _channels.add(channel)
        self._asking = threading.Lock()
        self._sending = threading.Lock()
        self._replies: SimpleQueue[Message | None] = SimpleQueue()
        self._num_asked = 0
        channel.settimeout(None)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(answer_s))
        self._reader = threading.Thread(target=self._read, name="holdfast-keeper", daemon=True)
        self._reader.start()
        threading.Thread(target=self._populate, args=(memory,), name="holdfast-populate", daemon=True).start()

    def mapped(self, num_bytes: int) -> memoryview:
        """Return the arena, which has so many bytes by now: it may have grown."""
        with self._mapping:
            if len(self._memory) < num_bytes:
                if self.is_lost:
                    raise KeeperLost("the keeper died")
                self._memory = map_arena(self._arena_fd, num_bytes)
            return memoryview(self._memory)

    def ask(self, message: Message) -> Message:
        """Send a message and wait for its reply. Raises KeeperLost when there will be none."""
        with self._asking:
            self._num_asked += 1
            self.tell({**message, "id": self._num_asked})
            asked_s = time.monotonic()
            while True:
                waited_s = time.monotonic() - max(asked_s, self._heard_s)
                try:
                    reply = self._replies.get(timeout=max(self._answer_s - waited_s, 0.0))
                except Empty:
                    if time.monotonic() - max(asked_s, self._heard_s) < self._answer_s:
                        continue  # it said meanwhile that it is busy
                    raise self._given_up() from None
                if reply is None:
                    raise KeeperLost("the keeper died")
                if reply["id"] == self._num_asked:
                    return reply

    def tell(self, message: Message) -> None:
        """Send a message that has no reply."""
        if self.is_lost:
            raise KeeperLost("the keeper died")
        with self._sending:
            try:
                send(self._channel, message)
            except KeeperLost as error:
                if isinstance(error.__cause__, BlockingIOError):
                    raise self._given_up() from error
                self._reader.join(self._answer_s)  # what the keeper said before it died is read to its end
                self.is_lost = True
                raise

    def close(self) -> None:
        """End the connection."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def _given_up(self) -> KeeperLost:
        self.is_hung = self.is_lost = True
        self.close()
        return KeeperLost(f"the keeper did not answer for {self._answer_s:g} s")

    def _populate(self, memory: mmap.mmap) -> None:
        """Map the arena's pages while the training begins; the first captures would wait for each of them."""
        num_bytes = len(memory)
        for offset in range(0, num_bytes, _POPULATED_BYTES):
            piece = Region(offset, min(_POPULATED_BYTES, num_bytes - offset))
            if self.is_lost or not populate(memory, piece):
                return

    def _read(self) -> None:
        try:
            while True:
                message = receive(self._channel)
                self._heard_s = time.monotonic()
                if "outcome" in message:
                    self.news.append(outcome_from_wire(message["outcome"]))
                elif "id" in message:
                    self._replies.put(message)
        except KeeperLost:
            self.is_lost = True
            self._replies.put(None)
            self._channel.close()
            with self._mapping:
                os.close(self._arena_fd)


def _let_go() -> None:
    """Close, in a child of a trainer, what tells the keeper that the trainer is there."""
    for channel in list(_channels):
        channel.close()


os.register_at_fork(after_in_child=_let_go)


def _join_or_start(config: KeeperConfig) -> _Link:
    """Find a living keeper or start one; a lock sees to it that one client does so at a time."""
    began_s, num_failed = time.monotonic(), 0
    deadline = began_s + config.start_s
    with start_locked(config, deadline):
        while True:
            try:
                return _dial(config)
            except TimeoutError:
                _end_hung(config)
            except KeeperBusy:
                if time.monotonic() > began_s + min(_BUSY_S, config.start_s):
                    raise
                time.sleep(_POLL_S)  # the trainer that was replaced is about to go
                continue
            except (KeeperLost, OSError):
                pass  # there is none, or it is about to end
            if time.monotonic() > deadline:
                raise KeeperLost(
                    f"a keeper (process {_pid(config)}) holds {config.home} and does not answer: "
                    f"end it, or see {config.log_path}"
                )
            if is_free(config):
                try:
                    log.info("started keeper %d of host %s", launch(config), config.host)
                except KeeperLost:  # it was killed, or one that a client started before it died was faster
                    num_failed += 1
                    if num_failed == _MAX_FAILED:
                        raise
            else:
                time.sleep(_POLL_S)  # one is about to listen, or to end


def _dial(config: KeeperConfig) -> _Link:
    """Connect to the keeper, on these terms.

    Raises TimeoutError if there is one that does not answer, OSError if none, KeeperBusy if it cannot.
    """
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.settimeout(config.answer_s)
        channel.connect(str(config.socket_path))
        return _Link(channel, config)
    except (OSError, CheckpointError) as error:
        channel.close()
        if isinstance(error.__cause__, TimeoutError):
            raise error.__cause__ from error
        raise


def _end_hung(config: KeeperConfig) -> None:
    pid = end_hung(config)
    if pid is not None:
        log.error("keeper %d of host %s did not answer for %g s: killed", pid, config.host, config.answer_s)


def _pid(config: KeeperConfig) -> str:
    with suppress(OSError):
        return config.life_lock_path.read_text()
    return "?"
