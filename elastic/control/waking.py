"""Time as the controller's process lived it: what that slept through counts against nobody. Pure."""

from dataclasses import dataclass

NAP_S = 1.0  # between two looks; it looks ten times a second


@dataclass(slots=True)
class WakingClock:
    """Runs on with a clock, but for what is longer than a nap between two readings.

    A process that was stopped, or its whole machine, finds that everybody was silent for as long: they could
    not be heard.
    """

    slept_s: float = 0.0
    _read_at: float | None = None

    def read(self, now: float) -> float:
        """Return the waking time."""
        gap_s = 0.0 if self._read_at is None else now - self._read_at
        self.slept_s += max(0.0, gap_s - NAP_S)
        self._read_at = now
        return now - self.slept_s
