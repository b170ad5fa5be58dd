"""What became of a save: two futures, captured and durable, which learn of news when they are asked."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from checkpoint.engine.contract import Durable, Failed, Outcome
from checkpoint.errors import CheckpointError

_POLL_S = 0.01


class Fate(Future[Durable]):
    """Ends when a checkpoint is durable on a tier, or never will be. No thread waits for it: asking looks."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def done(self) -> bool:
        """Whether it is decided by now."""
        self._look()
        return super().done()

    def result(self, timeout: float | None = None) -> Durable:
        """Wait until it is decided. Raises CheckpointError if the checkpoint failed, TimeoutError."""
        self._await(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until it is decided; return why the checkpoint failed, if it did. Raises TimeoutError."""
        self._await(timeout)
        return super().exception(0)

    def _await(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError("the checkpoint is neither durable nor given up yet")
            time.sleep(_POLL_S)  # outcomes come from a host, which is only ever asked


@dataclass(slots=True)
class Saving:
    """A save under way. `captured` ends when the state may change again; captured is not durable."""

    step: int
    generation: int
    captured: "Future[None]"
    tiers: tuple[str, ...]
    look: Callable[[], None]
    fates: dict[str, Fate] = field(default_factory=dict)

    def durable(self, tier: str = "") -> Fate:
        """Return what ends when the checkpoint is durable on a tier, by default the nearest it goes to.

        Raises ValueError for a tier that this checkpoint does not go to.
        """
        wanted = tier or self.tiers[0]
        if wanted not in self.tiers:
            raise ValueError(f"step {self.step} goes to {', '.join(self.tiers)}, not to {tier!r}")
        return self.fates.setdefault(wanted, Fate(self.look))

    def note_passed(self, newer: Durable | Failed) -> None:
        """Take note that a newer snapshot had its turn on a tier to which not every one comes."""
        if newer.generation == self.generation and newer.step > self.step:
            why = f"step {newer.step} had its turn instead: snapshots come faster than that tier takes them"
            self.note(Failed(self.step, self.generation, why, newer.tier))

    def note(self, outcome: Outcome) -> None:
        """Take note of what became known of this snapshot."""
        if isinstance(outcome, Durable):
            fate = self.durable(outcome.tier) if outcome.tier in self.tiers else None
            if fate is not None and not Future.done(fate):
                fate.set_result(outcome)
            return
        lost = (outcome.tier,) if isinstance(outcome, Failed) and outcome.tier else self.tiers
        for tier in lost:
            fate = self.durable(tier) if tier in self.tiers else None
            if fate is not None and not Future.done(fate):
                fate.set_exception(CheckpointError(f"step {self.step} is not on {tier}: {outcome.why}"))
