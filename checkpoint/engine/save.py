"""Save, the training loop's side: hand over a step's state, and wait only just before the next update."""

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from checkpoint.engine.arena import aligned
from checkpoint.engine.contract import Content, Failed, Handling, Host, Outcome, Slot, SnapshotPlan, Ticket
from checkpoint.engine.plan import TensorSpec, Write, plan_save
from checkpoint.engine.snapshot import Capturer, Snapshot
from checkpoint.engine.tensors import flatten_state, specs_of
from checkpoint.errors import Mismatch
from checkpoint.format.codec import Codec
from checkpoint.format.dtypes import itemsize

_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's place in its world: `hosts[r]` is the host of rank r."""

    generation: int
    rank: int
    size: int
    hosts: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.hosts) != self.size or not 0 <= self.rank < self.size:
            raise Mismatch(
                f"rank {self.rank} of {self.size} ranks with {len(self.hosts)} hosts is no place in a world"
            )

    @classmethod
    def alone(cls, host: str = "local", generation: int = 0) -> "Share":
        """The only rank of a world of one."""
        return cls(generation, 0, 1, (host,))


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """How snapshots are kept: the codec, and what to do while the arena is full.

    "wait" holds the loop (at `wait_captured`) until there is room, for `max_wait_s` at most; "skip" gives
    this checkpoint up at once. Either way an outcome tells.
    """

    codec: Codec = Codec.ZSTD
    level: int = 1
    when_full: Literal["wait", "skip"] = "wait"
    max_wait_s: float = 600.0


@dataclass(frozen=True, slots=True)
class _Deal:
    """The plan of the last save, kept while the tensors and the world stay the same."""

    specs: tuple[TensorSpec, ...]
    size: int
    writes: tuple[Write, ...]


class Saver:
    """Saves one rank's share of the state at each step it is told to.

    `save` returns at once; `wait_captured` has to be called before anything changes the state again (torch
    optimizers wait by themselves). Captured is not durable: `outcomes` tells what became of each snapshot.
    The host stays its maker's to close.
    """

    def __init__(self, host: Host, run: str, policy: SavePolicy | None = None) -> None:
        self._host = host
        self._run = run
        self._policy = policy or SavePolicy()
        self._capturer = Capturer(host)
        self._deal = _Deal((), 0, ())
        self._pending: set[tuple[int, int]] = set()
        self._unread: deque[Outcome] = deque(maxlen=1000)

    def save(self, step: int, state: Any, share: Share, meta: Mapping[str, Any]) -> None:
        """Begin the snapshot of `step`: the same full state, given by every rank of the world.

        Python values are taken now, tensors while the next forward and backward run. `meta` is plain data for
        the manifest; its "spec_digest" becomes the manifest's. Waits for the snapshot before, if that is
        still being captured. Raises `FormatError` for a state that has no plain form.
        """
        self._capturer.wait()
        skeleton, tensors = flatten_state(state)
        specs = specs_of(tensors)
        plan = SnapshotPlan(
            hosts=share.hosts,
            content=_content(specs, skeleton),
            meta=meta,
            handling=Handling(
                self._policy.codec, self._policy.level, self._policy.when_full, self._policy.max_wait_s
            ),
            slots=_slots(specs, self._writes(specs, share.size), share.rank),
        )
        ticket = Ticket(self._run, share.generation, step, share.rank)
        self._pending.add((share.generation, step))
        self._capturer.start(Snapshot(ticket, plan, list(tensors.values())))

    def wait_captured(self) -> float:
        """Wait until the snapshot in hand is captured; return the seconds that took.

        A snapshot that turned out to be torn is spoiled and reported as an outcome; training goes on. Raises
        `ArenaFull` if the state could never be captured with this arena.
        """
        if self._capturer.is_idle:
            return 0.0
        started = time.perf_counter()
        self._capturer.wait()
        return time.perf_counter() - started

    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what became known of snapshots since this was last asked, without waiting."""
        self._take()
        taken = tuple(self._unread)
        self._unread.clear()
        return taken

    def drain(self, timeout_s: float) -> bool:
        """Wait until every snapshot has its outcome (`outcomes` still tells it); False if time ran out."""
        deadline = time.monotonic() + timeout_s
        self._capturer.wait()
        while True:
            self._take()
            if not self._pending:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the capture thread, after the snapshot in hand. What was captured goes on to be durable."""
        self._capturer.close()

    def _take(self) -> None:
        for ending in self._capturer.endings():
            self._pending.discard((ending.ticket.generation, ending.ticket.step))
            if ending.why is not None:
                self._unread.append(Failed(ending.ticket.step, ending.ticket.generation, ending.why))
        for outcome in self._host.outcomes():
            self._pending.discard((outcome.generation, outcome.step))
            self._unread.append(outcome)

    def _writes(self, specs: tuple[TensorSpec, ...], size: int) -> tuple[Write, ...]:
        if (self._deal.specs, self._deal.size) != (specs, size):
            self._deal = _Deal(specs, size, tuple(plan_save(specs, size)))
        return self._deal.writes


def _content(specs: Sequence[TensorSpec], skeleton: Any) -> Content:
    text = json.dumps(skeleton, separators=(",", ":"), allow_nan=False)
    described = json.dumps([[spec.name, spec.dtype, spec.shape] for spec in specs], separators=(",", ":"))
    digest = xxhash.xxh3_128_hexdigest(f"{described}\n{text}".encode())
    return Content(tuple(specs), text, digest)


def _slots(specs: Sequence[TensorSpec], writes: Sequence[Write], rank: int) -> tuple[Slot, ...]:
    slots = []
    offset = 0
    for write in writes:
        if write.writer != rank:
            continue
        num_bytes = write.box.numel * itemsize(specs[write.tensor].dtype)
        slots.append(Slot(write.tensor, write.box, offset, num_bytes))
        offset = aligned(offset + num_bytes)
    return tuple(slots)
