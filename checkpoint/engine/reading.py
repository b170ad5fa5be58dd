"""How a restore reads, and what it tells of it: its policy, its counts, and what is left to be read."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from checkpoint.engine.bounds import check_seconds, check_whole
from checkpoint.engine.pooling import Pool
from checkpoint.engine.regions import Column, Regions
from checkpoint.errors import Corrupt
from checkpoint.format.records import MAX_CHUNK_BYTES
from checkpoint.store.contract import ByteRange

WASTE = 20  # of so many bytes that are read, one may be read in vain
GAP_BYTES = 64 << 10
DECODING = 4  # times a chunk's raw bytes: what undoing a codec and a delta takes, result included
_CHUNK_ROOM_BYTES = 8 * MAX_CHUNK_BYTES  # what one chunk takes at most, whatever its codec
_MAX_LISTED = 100


class Group(Protocol):
    """Ranks that want the same boxes of the same tensors, each in memory of its own."""

    @property
    def rank(self) -> int:
        """This rank's number in the group, from 0."""

    @property
    def size(self) -> int:
        """How many ranks the group has."""

    def broadcast(self, memory: memoryview, root: int) -> None:
        """Make the memory of every rank like that of `root`; all ranks call it, with as many bytes."""


@dataclass(frozen=True, slots=True)
class ReadPolicy:
    """How a restore reads.

    What it holds at a time, besides the targets and the checkpoint's index, stays within `budget_bytes`. A
    request asks for about `request_bytes`; it reads over gaps of at most `gap_bytes`, as long as they stay
    below a twentieth of what is needed. With a `group`, replicas read each byte once, and broadcast it. When
    a nearer source has said what it has, a farther one is waited for `patience_s` at most; when a nearer
    store has said that it has nothing, for `empty_patience_s`, and then the restore fails: a training that
    starts anew beside a store it could not ask may lose all that is there.

    Every byte is proved by its fingerprint, made anew: that it is what was written, and that it belongs where
    it goes. What a codec or a delta made is held against its checksum as well.

    With a `pool` a chunk of which this rank wants a part is not read as a whole, where that can be: the
    fingerprint of the part goes into the pool, and nothing is proved before those of all ranks add up.
    """

    num_threads: int = 2
    budget_bytes: int = 256 << 20
    request_bytes: int = 8 << 20
    gap_bytes: int = GAP_BYTES
    group: Group | None = None
    patience_s: float = 5.0
    empty_patience_s: float = 15.0
    pool: Pool | None = None

    def __post_init__(self) -> None:
        check_whole("num_threads", self.num_threads, 1)
        check_whole("budget_bytes", self.budget_bytes, 0)
        check_whole("request_bytes", self.request_bytes, 1)
        check_whole("gap_bytes", self.gap_bytes, 0)
        check_seconds("patience_s", self.patience_s)
        check_seconds("empty_patience_s", self.empty_patience_s)
        if self.budget_bytes < _CHUNK_ROOM_BYTES:
            raise ValueError(
                f"a restore needs a budget of at least {_CHUNK_ROOM_BYTES >> 20} MiB, "
                f"not {self.budget_bytes} bytes"
            )

    @property
    def num_readers(self) -> int:
        """How many threads read: no more than the budget has room for."""
        return min(self.num_threads, self.budget_bytes // _CHUNK_ROOM_BYTES)


@dataclass(slots=True)
class Span:
    """A range of a pack that grows over what lies close behind it, as long as it wastes little."""

    start: int
    num_bytes: int = 0
    num_wasted: int = 0

    def takes(self, start: int, num_bytes: int, gap_bytes: int = GAP_BYTES) -> bool:
        """Whether what begins at `start`, not before this span, is worth to be read together with it."""
        gap = max(start - self.start - self.num_bytes, 0)
        return gap <= gap_bytes and (self.num_wasted + gap) * WASTE <= start + num_bytes - self.start

    def add(self, start: int, num_bytes: int) -> None:
        """Grow over it."""
        self.num_wasted += max(start - self.start - self.num_bytes, 0)
        self.num_bytes = max(self.num_bytes, start + num_bytes - self.start)


@dataclass(frozen=True, slots=True)
class Detour:
    """Something that a source could not give as it was written, so that it was looked for elsewhere."""

    source: str
    item: str
    why: str


@dataclass(slots=True)
class Tally:
    """The counts of a restore under way; `detours` are the first hundred of `num_detours`."""

    num_requests: int = 0
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_detours: int = 0
    detours: list[Detour] = field(default_factory=list)
    _last: Corrupt = field(default_factory=Corrupt)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, source: str, ranges: Sequence[ByteRange]) -> None:
        """Count a request."""
        self.add(source, len(ranges), sum(wanted.num_bytes for wanted in ranges))

    def add(self, source: str, num_requests: int, num_bytes: int) -> None:
        """Count several requests."""
        with self._lock:
            self.num_requests += num_requests
            self.num_bytes[source] = self.num_bytes.get(source, 0) + num_bytes

    def note(self, source: str, item: str, why: object) -> None:
        """Remember a detour."""
        with self._lock:
            self.num_detours += 1
            if len(self.detours) < _MAX_LISTED:
                self.detours.append(Detour(source, item, str(why)))
            self._last = Corrupt(f"{item}: {why}")

    def last(self) -> Corrupt:
        """Return the last detour as an error."""
        with self._lock:
            return self._last


@dataclass(frozen=True, slots=True)
class Holes:
    """What is not filled yet: row i is a region of wanted box number `wanted[i]`."""

    wanted: Column
    regions: Regions

    def __len__(self) -> int:
        return len(self.wanted)

    @classmethod
    def all(cls, boxes: Regions) -> "Holes":
        """Return the holes of targets that nothing is filled of."""
        numbers = np.flatnonzero((boxes.sizes > 0).all(axis=1))
        return cls(numbers, boxes.take(numbers))
