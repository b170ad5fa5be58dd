"""How fast something that nobody waits for may read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint.engine.bounds import check_kind


@dataclass(slots=True)
class Pace:
    """At most `bytes_per_s` on average since the first byte."""

    bytes_per_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _began_s: float | None = field(default=None, init=False)
    _num_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_kind("bytes_per_s", self.bytes_per_s, int | float)
        if not self.bytes_per_s > 0:
            raise ValueError(f"a pace is above zero, not {self.bytes_per_s} bytes per second")

    def spend(self, num_bytes: int) -> None:
        """Wait until so many more bytes are due."""
        now_s = self.clock()
        if self._began_s is None:
            self._began_s = now_s
        self._num_bytes += num_bytes
        ahead_s = self._began_s + self._num_bytes / self.bytes_per_s - now_s
        if ahead_s > 0:
            self.sleep(ahead_s)
