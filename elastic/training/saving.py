"""The trainer's side of checkpoints: which snapshots were begun, and what became of them, as events."""

from collections.abc import Callable, Mapping
from typing import Any

from checkpoint import Durable, Loaded, Outcome, Saver, Share, Skipped
from elastic.control.events import CheckpointCaptured, CheckpointDurable, CheckpointLost, Event
from elastic.training.job import Job
from elastic.training.plan import TrainPlan

_MEMORIES = ("memory", "parity")
_STORE = "store"  # as reports of restores call it
_NEAREST_FIRST = ("memory", "peers", "parity", _STORE)  # any other is a further tier


class Snapshots:
    """One member's snapshots. Without a saver, saving does nothing."""

    def __init__(self, saver: Saver | None, member: str, meta: Mapping[str, Any]) -> None:
        self._saver = saver
        self._member = member
        self._meta = meta
        self._newest: tuple[int, int] | None = None
        self._capturing: tuple[int, int] | None = None
        self._is_waiting = False
        self._lost: dict[tuple[int, int], str] = {}
        self._untold: list[Event] = []

    def hold(self, generation: int, step: int) -> None:
        """Note that the step needs no saving in this world: it was restored from its checkpoint."""
        self._newest = (generation, step)

    def save(self, share: Share, step: int, tree: Callable[[int], Any]) -> None:
        """Begin the snapshot of a step, unless this world has it already. Every rank has to do the same."""
        this = (share.generation, step)
        if self._saver is None or this == self._newest:
            return
        self.wait_captured()
        self._saver.save(step, tree(step), share, self._meta)
        self._newest = self._capturing = this

    def wait_captured(self) -> float:
        """Wait until the state may change again; return the seconds that took."""
        if self._saver is None or self._capturing is None:
            return 0.0
        self._is_waiting = True
        blocked_s = self._saver.wait_captured()
        self._is_waiting = False
        (generation, step), self._capturing = self._capturing, None
        if (generation, step) not in self._read_outcomes():
            self._untold.append(CheckpointCaptured(self._member, generation, step, blocked_s))
        return blocked_s

    @property
    def is_waiting_for_room(self) -> bool:
        """Whether training can only go on once there is room in the arena. May be asked by any thread."""
        return self._is_waiting and self._saver is not None and self._saver.is_short_of_room

    def drain(self, timeout_s: float) -> bool:
        """Wait until the fate of every snapshot is known; False if time ran out."""
        return self._saver is None or self._saver.drain(timeout_s)

    def why_newest_lost(self) -> str | None:
        """Say why the newest snapshot became no checkpoint; None if it did, or nothing is known yet."""
        self._read_outcomes()
        return self._lost.get(self._newest) if self._newest else None

    def news(self) -> list[Event]:
        """Return what happened since this was last asked."""
        self._read_outcomes()
        news, self._untold = self._untold, []
        return news

    def _read_outcomes(self) -> set[tuple[int, int]]:
        """Read what became known; return the snapshots that were lost."""
        told = () if self._saver is None else self._saver.outcomes()
        outcomes = [outcome for outcome in told if not _is_of_memory(outcome)]
        self._untold.extend(self._event(outcome) for outcome in outcomes)
        lost = {(each.generation, each.step): each.why for each in outcomes if not isinstance(each, Durable)}
        self._lost |= lost
        return set(lost)

    def _event(self, outcome: Outcome) -> Event:
        if isinstance(outcome, Durable):
            return CheckpointDurable(
                self._member,
                outcome.generation,
                outcome.step,
                outcome.tier,
                outcome.num_bytes,
                outcome.seconds,
            )
        return CheckpointLost(self._member, outcome.generation, outcome.step, outcome.why)


def describe(loaded: Loaded) -> str:
    """Say what a person should know of a restore: what it passed over, and whose memories it came from."""
    report = loaded.report
    told = [f"passed over step {each.step}: {each.why}" for each in report.fallbacks]
    read = [
        f"{num_bytes} bytes from {source}" for source, num_bytes in sorted(report.bytes_by_source.items())
    ]
    return "; ".join([*told, *(read if set(report.bytes_by_source) - {_STORE} else [])])


def sources_of(loaded: Loaded) -> str:
    """Name the places that a restored state was read from, nearest first, joined by +."""
    used = sorted(name for name, num_bytes in loaded.report.bytes_by_source.items() if num_bytes)
    nearest = [name for name in _NEAREST_FIRST if name in used]
    return "+".join([*nearest, *(name for name in used if name not in nearest)]) or _STORE


def origin_of(job: Job, plan: TrainPlan) -> dict[str, Any]:
    """Return what a checkpoint's manifest says of its training."""
    return {
        "job": f"{type(job).__module__}:{type(job).__qualname__}",
        "source": plan.source,
        "seed": plan.seed,
        "virtual_ranks": plan.virtual_ranks,
        "micro_batch": plan.micro_batch,
        "spec_digest": plan.spec_digest,
    }


def _is_of_memory(outcome: Outcome) -> bool:
    """Whether an outcome tells of the hosts' memories, which are no store that recovery counts on."""
    return not isinstance(outcome, Skipped) and outcome.tier in _MEMORIES
