"""When processes may be started beside a world that goes on. Pure."""

from dataclasses import dataclass

HASTE_S = 2.0
LONGEST_PAUSE_S = 60.0
_MAX_DOUBLINGS = 6


@dataclass(slots=True)
class Starts:
    """Survivors on their way to their next step come first, for so long at most: a process that starts takes
    seconds of a core. Where one start after the other fails, pauses come between them, each twice as long.
    """

    _hurrying_since: float | None = None
    _num_failed: int = 0
    _paused_until: float = 0.0

    def hurry(self, now: float) -> None:
        """Note that survivors set out, unless they are on their way."""
        self._hurrying_since = now if self._hurrying_since is None else self._hurrying_since

    def relax(self, by: float) -> None:
        """Note that they have arrived if they set out by then."""
        if self._hurrying_since is not None and self._hurrying_since <= by:
            self._hurrying_since = None

    def fail(self, now: float) -> None:
        """Note that a process ended before it was ready."""
        pause_s = 2.0 ** min(self._num_failed - 1, _MAX_DOUBLINGS) if self._num_failed else 0.0
        self._paused_until = now + min(pause_s, LONGEST_PAUSE_S)
        self._num_failed += 1

    def succeed(self) -> None:
        """Note that one is ready."""
        self._num_failed, self._paused_until = 0, 0.0

    def may_begin(self, now: float) -> bool:
        """Say whether one may start now."""
        return self._hurrying_since is None and now >= self._paused_until
