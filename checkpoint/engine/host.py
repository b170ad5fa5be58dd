"""A host in this very process: for a notebook, a single process, a test. It does not outlive the process."""

from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint.engine.arena import Arena, Region, Sizing
from checkpoint.engine.contract import Failed, Outcome, Pressure, SnapshotPlan, Ticket
from checkpoint.engine.held import Held
from checkpoint.engine.intake import Intake
from checkpoint.engine.leaving import finish_at_exit
from checkpoint.engine.pipeline import Pipeline, Tuning
from checkpoint.store.contract import Store

DEFAULT_ARENA_BYTES = 1 << 30
DIGEST_S = 60.0  # a snapshot that is asked for and not digested by then is passed over for an older one


class LocalSession:
    """One saver's side of a host in the same process."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._news = intake.board.subscribe()

    def open(self, ticket: Ticket, plan: SnapshotPlan) -> memoryview | None:
        """Lend arena space for a share, as `Host.open` says."""
        lent = self._intake.open(ticket, plan, self)
        if isinstance(lent, Failed):
            self._intake.board.tell_one(self._news, lent)
        return self._intake.arena.view(lent) if isinstance(lent, Region) else None

    def ready(self, ticket: Ticket, chunk_index: int) -> None:
        """Say that a slot's bytes are in."""
        self._intake.ready(ticket, (chunk_index,))

    def seal(self, ticket: Ticket) -> None:
        """Say that the share is captured."""
        self._intake.seal(ticket)

    def spoil(self, ticket: Ticket, why: str) -> None:
        """Say that the share must not be used."""
        self._intake.spoil(ticket, why)

    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what became known since this was last asked."""
        return self._intake.board.take(self._news)

    @contextmanager
    def held(self) -> Iterator[Held | None]:
        """Pin and return the newest snapshot that is held whole, as `Memory.held` says."""
        entry = self._intake.holding.pin(DIGEST_S)
        try:
            yield None if entry is None else entry.image
        finally:
            if entry is not None:
                self._intake.holding.unpin(entry)


class LocalHost:
    """Keeps snapshots in this process and writes them to a store; the newest `hold` stay in memory as well.

    It is itself the host of one saver (see `Host`); more savers get a `session` each.
    """

    def __init__(
        self,
        store: Store,
        host: str = "local",
        *,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        hold: int = 0,
        tuning: Tuning | None = None,
        sizing: Sizing | None = None,
    ) -> None:
        self._arena = Arena(arena_bytes, sizing or Sizing())
        self._intake = Intake(host, self._arena, hold)
        self._pipeline = Pipeline(store, self._intake, tuning)
        finish_at_exit(self._intake.drain)
        session = self.session()
        self.open = session.open
        self.ready = session.ready
        self.seal = session.seal
        self.spoil = session.spoil
        self.outcomes = session.outcomes
        self.held = session.held
        self.settle = self._intake.settle

    def session(self) -> LocalSession:
        """Return a host for one more saver (another rank) of this process."""
        return LocalSession(self._intake)

    @property
    def intake(self) -> Intake:
        """The books of this host: for who looks after its checkpoints."""
        return self._intake

    def pressure(self) -> Pressure:
        """Return how tight memory has been so far."""
        return self._intake.pressure

    def close(self, flush_s: float = 600.0) -> bool:
        """Write out what was captured, then end; False if that took longer than `flush_s` and was cut off."""
        self._intake.end("the host is closing")
        is_flushed = self._intake.drain(flush_s)
        self._intake.close()
        self._pipeline.join()
        self._arena.close()
        return is_flushed

    def __enter__(self) -> "LocalHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
