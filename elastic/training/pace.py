"""How fast each rank computes a virtual rank: measured, told to everybody, used to deal the next step."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from elastic.control.dealing import Dealing, deal

NUM_MEASURED = 9
"""Of the newest measurements the median counts: a few odd ones change nothing, a change shows in five."""


class Pace:
    """A member's own seconds per virtual rank, those that the others told last, and what follows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mine_s: deque[float] = deque(maxlen=NUM_MEASURED)
        self._everyones: tuple[float, ...] = ()
        self._dealing: Dealing | None = None
        self._since: float | None = None
        self._waited_s = 0.0

    @property
    def mine_us(self) -> int:
        """Our microseconds per virtual rank, 0 while nothing was measured."""
        return round(median(self._mine_s) * 1e6) if self._mine_s else 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure one virtual rank's forward and backward; on a device, until they are done."""
        started = time.perf_counter()
        self._since = started if self._mine_s else None  # the first one may compile, or warm up a device
        self._waited_s = 0.0
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        finally:
            self._since = None
        self.note(time.perf_counter() - started - self._waited_s)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave out of what is measured that other ranks are waited for."""
        since, started = self._since, time.perf_counter()
        self._since = None
        yield
        waited_s = time.perf_counter() - started
        self._waited_s += waited_s
        self._since = None if since is None else since + waited_s

    def note(self, seconds: float) -> None:
        """Take note of how long a virtual rank took."""
        self._mine_s.append(seconds)

    @property
    def working_s(self) -> float:
        """How long our present virtual rank takes already; 0 between two, and in the first one of all."""
        since = self._since
        return 0.0 if since is None else time.perf_counter() - since

    def learn(self, everyones_us: Sequence[int]) -> None:
        """Take what every rank of the world told, the same numbers on all of them."""
        self._everyones = tuple(each / 1e6 for each in everyones_us)

    def forget_others(self) -> None:
        """A new world: nobody has told anything yet."""
        self._everyones, self._dealing = (), None

    def deal(self, num_virtual: int, size: int) -> Dealing:
        """Deal a step of a world of this size; every rank that learned the same deals the same."""
        seconds = self._everyones or (0.0,) * size
        self._dealing = deal(num_virtual, seconds, self._dealing)
        return self._dealing
