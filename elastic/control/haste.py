"""Survivors on their way to their next step: a process that starts takes seconds of a core, and they come
first, for so long at most. Pure.
"""

from dataclasses import dataclass

HASTE_S = 2.0


@dataclass(slots=True)
class Haste:
    """Since when survivors hurry, if they do."""

    since: float | None = None

    def begin(self, now: float) -> None:
        """Note that survivors set out, unless they are on their way."""
        self.since = now if self.since is None else self.since

    def ends(self, by: float) -> bool:
        """End it if it began by then; return whether it did."""
        if self.since is None or self.since > by:
            return False
        self.since = None
        return True
