"""Save, the training loop's side: hand over a step's state, and wait only just before the next update."""

import json
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash

from checkpoint.engine.bounds import check_one_of, check_seconds, check_whole
from checkpoint.engine.contract import (
    Content,
    Depth,
    Failed,
    Handling,
    Host,
    Outcome,
    SnapshotPlan,
    Ticket,
    is_final,
)
from checkpoint.engine.given import plain_meta, plain_step
from checkpoint.engine.guards import Guards
from checkpoint.engine.leaves import Leaves, describe, own_tensors, signature_of, take_apart
from checkpoint.engine.quiet import no_collection
from checkpoint.engine.snapshot import Capturer, Snapshot, take
from checkpoint.engine.staging import Staging
from checkpoint.engine.structure import Structure, plan_structure
from checkpoint.errors import Mismatch, Unsupported
from checkpoint.format.codec import Codec, codec_of
from checkpoint.format.frames import MAX_LEVEL, MIN_LEVEL

MAX_SKELETON_BYTES = 24 << 20  # of a state's plain values as JSON, so that every reader takes the manifest
MAX_CONTAINERS = 1 << 21
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
    this checkpoint up at once. Either way an outcome tells. With a `delta_chain` a changed chunk may be
    stored as its difference from an earlier checkpoint's, up to so many in a row.
    """

    codec: Codec = Codec.PLANES
    level: int = 1
    when_full: Literal["wait", "skip"] = "wait"
    max_wait_s: float = 600.0
    delta_chain: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", codec_of(self.codec))
        check_whole("level", self.level, MIN_LEVEL, MAX_LEVEL)
        check_one_of("when_full", self.when_full, ("wait", "skip"))
        check_seconds("max_wait_s", self.max_wait_s)
        check_whole("delta_chain", self.delta_chain, 0)


@dataclass(frozen=True, slots=True)
class _Cache:
    """What is kept while the state's structure and the rank's place stay the same: a plan, and room."""

    structure: Structure
    small: Staging
    guards: Guards


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
        self._cache: _Cache | None = None
        self._pending: dict[tuple[int, int], Depth] = {}
        self._unread: deque[Outcome] = deque(maxlen=1000)

    def save(
        self, step: int, state: Any, share: Share, meta: Mapping[str, Any], *, depth: Depth = "store"
    ) -> "Future[None]":
        """Begin the snapshot of `step`, given by every rank of the world; return what ends with its capture.

        All ranks give the same state: tensors that each holds in full, DTensors, plain values that are equal
        everywhere, and PerRank values that are not. Plain values and small tensors are taken now, large ones
        while the next forward and backward run. At depth "memory" the hosts keep it and nothing is written.

        `meta` is plain data for the manifest; its "spec_digest", "data_cursor" and "metrics" become the
        manifest's. Waits for the snapshot before, if that is still being captured. Raises `FormatError` for a
        state or meta that has no plain form, `Mismatch` for one that does not lie on its ranks as it says,
        TypeError or ValueError for a step that is none.
        """
        self._capturer.wait()
        step, meta = plain_step(step), plain_meta(meta)
        # Buffers that are kept would be inference tensors in that mode: nobody could fill them outside of it.
        with no_collection(), torch.inference_mode(False):
            snapshot = self._taken(step, state, share, meta, depth)
        self._pending[share.generation, step] = depth
        self._capturer.start(snapshot)
        return snapshot.captured

    def wait_captured(self) -> float:
        """Wait until the snapshot in hand is captured; return the seconds that took.

        A snapshot that turned out to be torn is spoiled and reported as an outcome; training goes on. So it
        does with one that is too large for the arena.
        """
        if self._capturer.is_idle:
            return 0.0
        started = time.perf_counter()
        self._capturer.wait()
        return time.perf_counter() - started

    @property
    def is_short_of_room(self) -> bool:
        """Whether the snapshot in hand waits for room in the arena; `max_wait_s` is the longest it may.

        May be asked by any thread.
        """
        return 0.0 < self._capturer.asking_s <= self._policy.max_wait_s

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
            time.sleep(_POLL_S)  # outcomes come from a host, which is only ever asked

    def close(self) -> None:
        """End the capture thread, after the snapshot in hand. What was captured goes on to be durable."""
        self._capturer.close()

    def _taken(self, step: int, state: Any, share: Share, meta: Mapping[str, Any], depth: Depth) -> Snapshot:
        """Take what changes next, and plan the rest."""
        taken = take_apart(state)
        own = own_tensors(taken.names, taken.leaves)
        cache = self._cached(taken, share)
        structure = cache.structure
        plan = SnapshotPlan(
            hosts=share.hosts,
            content=_content(structure, taken.skeleton),
            meta=meta,
            handling=self._handling(depth),
            slots=structure.slots,
        )
        ticket = Ticket(self._run, share.generation, step, share.rank)
        return Snapshot(ticket, plan, take(structure, cache.small, cache.guards, own, step), Future())

    def _take(self) -> None:
        for ending in self._capturer.endings():
            self._pending.pop((ending.ticket.generation, ending.ticket.step), None)
            if ending.why is not None:
                self._unread.append(Failed(ending.ticket.step, ending.ticket.generation, ending.why))
        for outcome in self._host.outcomes():
            depth = self._pending.get((outcome.generation, outcome.step))
            if depth is not None and is_final(outcome, depth):
                del self._pending[outcome.generation, outcome.step]
            self._unread.append(outcome)

    def _cached(self, taken: Leaves, share: Share) -> _Cache:
        signatures = tuple(map(signature_of, taken.names, taken.leaves))
        key = (share.rank, share.size, signatures)
        if self._cache is None or self._cache.structure.key != key:
            leaves = [
                describe(name, leaf, share.rank, share.size)
                for name, leaf in zip(taken.names, taken.leaves, strict=True)
            ]
            self._cache = None  # its buffers first
            structure = plan_structure(key, leaves)
            self._cache = _Cache(structure, Staging(structure), Guards(structure))
        return self._cache

    def _handling(self, depth: Depth) -> Handling:
        policy = self._policy
        return Handling(
            policy.codec, policy.level, policy.when_full, policy.max_wait_s, depth, policy.delta_chain
        )


def _content(structure: Structure, skeleton: Any) -> Content:
    text = json.dumps(skeleton, separators=(",", ":"), allow_nan=False)
    _check_room(skeleton, text)
    digest = xxhash.xxh3_128_hexdigest(f"{structure.described}\n{text}".encode())
    return Content(structure.specs, text, digest)


def _check_room(skeleton: Any, text: str) -> None:
    """Raise Unsupported, naming the largest part, for plain values that no manifest can hold."""
    num_containers = text.count("[") + text.count("{")
    if len(text) <= MAX_SKELETON_BYTES and num_containers <= MAX_CONTAINERS:
        return
    parts = skeleton if isinstance(skeleton, dict) and "$" not in skeleton else {"the state": skeleton}
    largest = max(parts, key=lambda name: len(json.dumps(parts[name])))
    raise Unsupported(
        f"the plain values of the state take {len(text)} bytes in {num_containers} lists and dicts, and at "
        f"most {MAX_SKELETON_BYTES} and {MAX_CONTAINERS} can be kept; most of it is {largest!r}: "
        "make long lists tensors (torch.tensor)"
    )
