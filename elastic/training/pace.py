"""How fast each rank computes a virtual rank: measured, told to everybody, used to deal the next step."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

NEWEST = 0.25  # weight of the newest measurement in the moving average


class Pace:
    """A member's own seconds per virtual rank, a moving average, and those that the others told last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mine_s = 0.0
        self._everyones: tuple[float, ...] = ()
        self._since: float | None = None
        self._waited_s = 0.0

    @property
    def mine_us(self) -> int:
        """Our microseconds per virtual rank, 0 while nothing was measured."""
        return round(self._mine_s * 1e6)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure one virtual rank's forward and backward; on a device, until they are done."""
        started = time.perf_counter()
        self._since = started if self._mine_s else None  # the first one may compile, or warm up a device
        self._waited_s = 0.0
        yield
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._since, seconds = None, time.perf_counter() - started - self._waited_s
        self._mine_s += (seconds - self._mine_s) * (NEWEST if self._mine_s else 1.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave out of what is measured that other ranks are waited for."""
        since, started = self._since, time.perf_counter()
        self._since = None
        yield
        waited_s = time.perf_counter() - started
        self._waited_s += waited_s
        self._since = None if since is None else since + waited_s

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
        self._everyones = ()

    def everyones(self, size: int) -> tuple[float, ...]:
        """Return every rank's seconds per virtual rank; zeros while they are not known."""
        return self._everyones if len(self._everyones) == size else (0.0,) * size
