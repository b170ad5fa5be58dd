"""The keeper's side of the socket: sessions with trainers around one intake, one pipeline, one arena."""

import logging
import math
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from checkpoint.engine.arena import Arena, Region
from checkpoint.engine.contract import SnapshotPlan, Ticket
from checkpoint.engine.host import DIGEST_S
from checkpoint.engine.intake import Intake
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.news import News
from checkpoint.engine.pipeline import Pipeline, Tuning
from checkpoint.errors import CheckpointError, KeeperBusy, KeeperLost
from checkpoint.keeper.lease import Lease
from checkpoint.keeper.lineage import Lineage
from checkpoint.keeper.messages import (
    Message,
    held_to_wire,
    outcome_to_wire,
    peer_pid,
    plan_from_wire,
    receive,
    send,
    ticket_from_wire,
    timeval,
)
from checkpoint.keeper.peering.neighbourhood import Neighbourhood
from checkpoint.keeper.peering.policy import parse_policy
from checkpoint.keeper.reception import Adopt, Guest, MakeWay, Refuse, receive_client
from checkpoint.keeper.settings import KeeperConfig, parse_config
from checkpoint.keeper.upkeep import Upkeep, UpkeepPolicy
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.keeper")

ALIVE_S = 1.0  # so often a keeper that is still busy with a request says so

_TICK_S = 0.25
_SEND_S = 10.0  # a client that does not read for so long is given up


class Server:
    """Serves trainers until the lease is over or `stop` is called, and what it has is durable; then it ends.

    It listens until the very end: a trainer that comes while it still writes finds it, and it goes on.
    """

    def __init__(self, config: KeeperConfig, store: Store, listener: socket.socket) -> None:
        self._config = config
        self._store = store
        self._listener = listener
        self._arena = Arena(config.arena_bytes, config.sizing)
        self._intake = Intake(config.host, self._arena, config.hold)
        self._upkeep = self._upkeep_by(config)
        self._neighbourhood = Neighbourhood(self._intake)
        self._pipeline = Pipeline(store, self._intake, Tuning())
        self._lineage = Lineage(store)
        self._lock = threading.Lock()
        self._lease = Lease(config.lease_s, config.flush_s, alone_since_s=time.monotonic())
        self._sessions: list[_Session] = []
        self._stopping = threading.Event()
        self._stopped_s: float | None = None

    def stop(self) -> None:
        """Ask for the end; may be called from a signal handler."""
        self._stopping.set()

    def serve(self) -> bool:
        """Serve; return whether everything captured was written out in the end."""
        self._listener.settimeout(_TICK_S)
        while not self._is_over():
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
        return self._finish()

    def _is_over(self) -> bool:
        if self._lineage.is_over:
            return True
        num_undone, now_s = self._num_undone(), time.monotonic()
        if not self._stopping.is_set():
            with self._lock:
                return self._lease.is_over(now_s, num_undone)
        if self._stopped_s is None:
            self._stopped_s = now_s
            self._intake.end("the keeper is ending")
        return not num_undone or now_s - self._stopped_s >= self._config.flush_s

    def _num_undone(self) -> int:
        return self._intake.num_unfinished + self._upkeep.num_undone

    def _finish(self) -> bool:
        """Let go of everything; what is on its way to a far tier, the next keeper resumes."""
        self._intake.end("the keeper is ending")
        is_flushed = self._intake.num_unfinished == 0
        if self._upkeep.num_undone:
            log.warning("ended while checkpoints were on their way to far tiers")
        self._upkeep.close()
        self._neighbourhood.close()
        self._intake.close()
        if is_flushed:
            self._pipeline.join()
        log.info("memory: %s", self._intake.pressure)
        return is_flushed

    def _attend(self, channel: socket.socket) -> None:
        session = _Session(channel, self._intake, self._neighbourhood, self._lineage)
        try:
            if self._welcome(session):
                session.talk()
        except KeeperLost:
            log.info("a client left")
        except Exception:
            log.exception("a session broke")  # the session's border: the other ones go on
        finally:
            session.end()
            with self._lock:
                self._sessions = [one for one in self._sessions if one is not session]
                self._lease = self._lease.left(time.monotonic())
                is_alone = self._lease.alone_since_s is not None
            if is_alone:
                self._intake.abandon("no trainer is left on this host")

    def _welcome(self, session: "_Session") -> bool:
        """Take a client in, on its terms; False if it is to look for another keeper."""
        try:
            theirs = session.hear_out(self._config)
        except (KeyError, TypeError, ValueError) as error:
            why = f"these settings are no keeper's: {type(error).__name__}: {error}"
            return session.send_away({"kind": "Mismatch", "error": why})
        if self._lineage.look():
            return session.send_away({"leaving": "the store was deleted or replaced"})
        try:
            with self._lock:
                if why := self._receive(session, theirs):
                    return session.send_away({"leaving": why})
        except CheckpointError as error:
            return session.send_away({"kind": type(error).__name__, "error": str(error)})
        session.greet(self._arena)
        return True

    def _receive(self, session: "_Session", theirs: KeeperConfig) -> str:
        """Adopt a client's settings, or say why this keeper ends instead. Raises KeeperBusy, ArenaFull."""
        guests = [Guest(one.pid, one.config) for one in self._sessions if one.pid != session.pid]
        num_undone = self._num_undone() + self._intake.holding.num_only_here
        match receive_client(self._config, theirs, guests, num_undone):
            case Refuse(why):
                raise KeeperBusy(why)
            case MakeWay():
                self.stop()
                return "it was another run's"
            case Adopt() if self._stopping.is_set() and not self._call_off():
                return "it was told to end"
            case _:
                self._adopt(theirs)
                self._sessions.append(session)
                return ""

    def _call_off(self) -> bool:
        """Go on although the end was asked for, unless all is durable near: then a new keeper is as good."""
        if not self._intake.num_unfinished:
            self._upkeep.close()
            self._stopped_s = -math.inf
            return False
        log.warning("a trainer came while this keeper was ending: it goes on")
        self._stopping.clear()
        self._stopped_s = None
        self._intake.go_on()
        return True

    def _upkeep_by(self, config: KeeperConfig) -> Upkeep:
        policy = UpkeepPolicy(run=config.run)
        return Upkeep(self._store, self._intake, config.far, config.keep, policy)

    def _adopt(self, config: KeeperConfig) -> None:
        """Go by other settings from now on."""
        self._intake.adopt(config.hold, config.arena_bytes, config.sizing)
        if (config.far, config.keep) != (self._config.far, self._config.keep):
            log.info("far tiers and retention are others from now on: %s, %s", config.far, config.keep)
            before, self._upkeep = self._upkeep, self._upkeep_by(config)
            before.close()
        self._lease = self._lease.renewed(config.lease_s, config.flush_s)
        self._config = replace(config, directory=self._config.directory)


@dataclass(eq=False, slots=True)
class _Session:
    """One trainer's connection: its messages in their order, and what it is told of snapshots meanwhile."""

    channel: socket.socket
    intake: Intake
    neighbourhood: Neighbourhood
    lineage: Lineage
    pid: int = 0
    config: KeeperConfig = field(init=False)
    is_over: bool = False
    is_busy: bool = False
    plan: SnapshotPlan | None = None
    pinned: list[SnapshotEntry] = field(default_factory=list)
    news: News = field(default_factory=deque)
    telling: threading.Lock = field(default_factory=threading.Lock)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def hear_out(self, mine: KeeperConfig) -> KeeperConfig:
        """Return the settings that the client asks for."""
        self.channel.settimeout(_SEND_S)
        self.pid = peer_pid(self.channel)
        self.config = parse_config(receive(self.channel)["hello"], mine.home)
        self.channel.settimeout(None)
        return self.config

    def send_away(self, told: Message) -> bool:
        """Say why the client is not served here; always False."""
        log.info("process %d is sent away: %s", self.pid, told)
        send(self.channel, told)
        return False

    def greet(self, arena: Arena) -> None:
        """Hand the arena over, and begin to tell outcomes."""
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(_SEND_S))
        send(self.channel, {"arena_bytes": arena.num_bytes}, [arena.fd])
        self.news = self.intake.board.subscribe()
        threading.Thread(target=self._tell, name="holdfast-news", daemon=True).start()

    def talk(self) -> None:
        """Answer until the client leaves."""
        while True:
            message = receive(self.channel)
            self.is_busy = "id" in message
            try:
                reply = self._handle(message)
            except KeeperLost:
                raise
            except CheckpointError as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            except Exception as error:  # what one client says wrongly is told it, and costs no other one
                log.exception("a message of process %d: %.200s", self.pid, message)
                reply = {"error": f"the message makes no sense here: {type(error).__name__}: {error}"}
            self.is_busy = False
            if "id" in message:
                self._send({**reply, "id": message["id"]})

    def end(self) -> None:
        """Give up what the client leaves behind unsealed, and let go what it was reading."""
        self.is_over = True
        self.intake.leave(self, "its trainer ended before the snapshot was captured")
        while self.pinned:
            self.intake.holding.unpin(self.pinned.pop())
        with suppress(OSError):
            self.channel.close()

    def _handle(self, message: Message) -> Message:
        match message["verb"]:
            case "held":
                return self._hold()
            case "unheld":
                self.intake.holding.unpin(self.pinned.pop())
                return {}
            case "settle":
                above, timeout_s, patience_s = (message[one] for one in ("above", "timeout_s", "patience_s"))
                return {"steps": self.intake.settle(above, timeout_s, patience_s=patience_s)}
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
                return self._open(ticket, self.plan)
            case "ready":
                self.intake.ready(ticket, tuple(message["chunks"]))
            case "seal":
                self.intake.seal(ticket)
            case "spoil":
                self.intake.spoil(ticket, message["why"])
        return {}

    def _open(self, ticket: Ticket, plan: SnapshotPlan) -> Message:
        """Lend a region; say, to this client alone, why that comes too late."""
        if self.intake.is_stale(ticket) and self.lineage.look():
            raise KeeperLost("the store is another one by now")  # as this keeper will be
        self.lineage.note(ticket.generation)
        lent = self.intake.open(ticket, plan, self)
        if isinstance(lent, Region):
            return {"region": [lent.offset, lent.num_bytes], "arena_bytes": self.intake.arena.num_bytes}
        self._tell_news()  # the client asks for a snapshot's outcome as soon as it is refused
        return {"region": None, "over": None if lent is None else outcome_to_wire(lent)}

    def _hold(self) -> Message:
        """Pin the newest snapshot for this client, and describe it."""
        entry = self.intake.holding.pin(DIGEST_S)
        if entry is None or entry.image is None:
            return {"held": None}
        self.pinned.append(entry)
        return {"held": held_to_wire(entry.image), "arena_bytes": self.intake.arena.num_bytes}

    def _tell(self) -> None:
        try:
            while not self.is_over:
                self.intake.board.wait(self.news, ALIVE_S)
                if not self._tell_news() and self.is_busy:
                    self._send({"alive": True})
        except KeeperLost:
            return
        finally:
            self.intake.board.unsubscribe(self.news)

    def _tell_news(self) -> int:
        """Pass on what is known by now, in its order; return how much that was."""
        with self.telling:
            outcomes = self.intake.board.take(self.news)
            for outcome in outcomes:
                self._send({"outcome": outcome_to_wire(outcome)})
        return len(outcomes)

    def _send(self, message: Message) -> None:
        with self.sending:
            send(self.channel, message)
