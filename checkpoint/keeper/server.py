"""The keeper's side of the socket: sessions with trainers around one intake, one pipeline, one arena."""

import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from checkpoint.engine.arena import Arena
from checkpoint.engine.contract import SnapshotPlan
from checkpoint.engine.host import DIGEST_S
from checkpoint.engine.intake import Intake
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.pipeline import Pipeline, Tuning
from checkpoint.errors import ArenaFull, CheckpointError, KeeperLost
from checkpoint.keeper.lease import Lease
from checkpoint.keeper.messages import (
    Message,
    held_to_wire,
    outcome_to_wire,
    plan_from_wire,
    receive,
    send,
    ticket_from_wire,
    timeval,
)
from checkpoint.keeper.peering.neighbourhood import Neighbourhood
from checkpoint.keeper.peering.policy import parse_policy
from checkpoint.keeper.settings import KeeperConfig
from checkpoint.keeper.upkeep import Upkeep
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.keeper")

ALIVE_S = 1.0  # so often a keeper that is still busy with a request says so

_TICK_S = 0.25
_SEND_S = 10.0  # a client that does not read for so long is given up


class Server:
    """Serves trainers until the lease is over or `stop` is called; then writes out what it has, and ends."""

    def __init__(self, config: KeeperConfig, store: Store, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        self._arena = Arena(config.arena_bytes)
        self._intake = Intake(config.host, self._arena, config.hold)
        self._upkeep = Upkeep(store, self._intake, config.far, config.keep)
        self._neighbourhood = Neighbourhood(self._intake)
        self._pipeline = Pipeline(store, self._intake, Tuning())
        self._lock = threading.Lock()
        self._lease = Lease(config.lease_s, config.flush_s, alone_since_s=time.monotonic())
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask for the end; may be called from a signal handler."""
        self._stopping.set()

    def serve(self) -> bool:
        """Serve; return whether everything captured was written out in the end."""
        self._listener.settimeout(_TICK_S)
        while not (self._stopping.is_set() or self._is_lease_over()):
            try:
                channel, _ = self._listener.accept()
            except TimeoutError:
                continue
            with self._lock:
                self._lease = self._lease.joined()
            threading.Thread(
                target=self._attend, args=(channel,), name="holdfast-session", daemon=True
            ).start()
        self._listener.close()
        if not self._stopping.is_set():
            log.info("no client for %.0f s: ending", self._config.lease_s)
        return self._finish()

    def _finish(self) -> bool:
        """Flush what was captured, then what is due on far tiers, within the time for both."""
        deadline = time.monotonic() + self._config.flush_s
        self._intake.end("the keeper is ending")
        is_flushed = self._intake.drain(self._config.flush_s)
        if not self._upkeep.drain(max(deadline - time.monotonic(), 0.0)):
            log.warning(
                "ended while checkpoints were on their way to far tiers: the next keeper resumes that"
            )
        self._upkeep.close()
        self._neighbourhood.close()
        self._intake.close()
        self._pipeline.join()
        log.info("memory: %s", self._intake.pressure)
        return is_flushed

    def _is_lease_over(self) -> bool:
        with self._lock:
            return self._lease.is_over(time.monotonic(), self._intake.num_unfinished)

    def _attend(self, channel: socket.socket) -> None:
        session = _Session(channel, self._intake, self._neighbourhood)
        try:
            session.greet(self._arena)
            session.talk()
        except KeeperLost:
            log.info("a client left")
        except Exception:
            log.exception("a session broke")  # the session's border: the other ones go on
        finally:
            session.end()
            with self._lock:
                self._lease = self._lease.left(time.monotonic())
                is_alone = self._lease.alone_since_s is not None
            if is_alone:
                self._intake.abandon("no trainer is left on this host")


@dataclass(eq=False, slots=True)
class _Session:
    """One trainer's connection: its messages in their order, and what it is told of snapshots meanwhile."""

    channel: socket.socket
    intake: Intake
    neighbourhood: Neighbourhood
    is_over: bool = False
    is_busy: bool = False
    plan: SnapshotPlan | None = None
    pinned: list[SnapshotEntry] = field(default_factory=list)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def greet(self, arena: Arena) -> None:
        """Hand the arena over, and begin to tell outcomes."""
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(_SEND_S))
        send(self.channel, {"arena_bytes": arena.num_bytes}, [arena.fd])
        threading.Thread(target=self._tell, name="holdfast-news", daemon=True).start()

    def talk(self) -> None:
        """Answer until the client leaves."""
        while True:
            message = receive(self.channel)
            self.is_busy = "id" in message
            try:
                reply = self._handle(message)
            except ArenaFull as error:
                reply = {"arena_full": str(error)}
            except CheckpointError as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            self.is_busy = False
            if "id" in message:
                self._send({**reply, "id": message["id"]})

    def end(self) -> None:
        """Give up what the client leaves behind unsealed, and let go what it was reading."""
        self.is_over = True
        self.intake.leave(self, "its trainer ended before the snapshot was captured")
        while self.pinned:
            self.intake.unpin(self.pinned.pop())
        with suppress(OSError):
            self.channel.close()

    def _handle(self, message: Message) -> Message:
        match message["verb"]:
            case "held":
                return self._hold()
            case "unheld":
                self.intake.unpin(self.pinned.pop())
                return {}
            case "pressure":
                return {"pressure": asdict(self.intake.pressure)}
            case "listen":
                self.neighbourhood.listen(parse_policy(message["policy"]))
                return {"peers": self.neighbourhood.known()}
            case "peers":
                return {"peers": self.neighbourhood.known()}
            case "meet":
                self.neighbourhood.meet(message["generation"], message["peers"])
                return {}
        ticket = ticket_from_wire(message["ticket"])
        match message["verb"]:
            case "open":
                self.plan = plan_from_wire(message["plan"], self.plan)
                region = self.intake.open(ticket, self.plan, self)
                return {"region": None if region is None else [region.offset, region.num_bytes]}
            case "ready":
                self.intake.ready(ticket, tuple(message["chunks"]))
            case "seal":
                self.intake.seal(ticket)
            case "spoil":
                self.intake.spoil(ticket, message["why"])
        return {}

    def _hold(self) -> Message:
        """Pin the newest snapshot for this client, and describe it."""
        entry = self.intake.pin(DIGEST_S)
        if entry is None or entry.image is None:
            return {"held": None}
        self.pinned.append(entry)
        return {"held": held_to_wire(entry.image)}

    def _tell(self) -> None:
        news = self.intake.board.subscribe()
        try:
            while not self.is_over:
                outcomes = self.intake.board.await_news(news, ALIVE_S)
                for outcome in outcomes:
                    self._send({"outcome": outcome_to_wire(outcome)})
                if self.is_busy and not outcomes:
                    self._send({"alive": True})
        except KeeperLost:
            return
        finally:
            self.intake.board.unsubscribe(news)

    def _send(self, message: Message) -> None:
        with self.sending:
            send(self.channel, message)
