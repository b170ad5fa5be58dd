"""Which members hang: those that are silent for much longer than anybody was before. Pure.

The limit grows with the pauses that living members make on this very cluster (the idea of accrual failure
detectors, Hayashibara et al. 2004), so a busy machine is not taken for a dead one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PAUSES = 4.0  # a silence of so many of the longest pauses is suspicious
FADING = 0.998  # of the longest pause, with each look: one hiccup is forgotten after a minute
UNKNOWN_S = 0.75  # a pause that is thought possible until this cluster is known better


@dataclass(slots=True)
class Suspicion:
    """Watches how long members are silent; none is suspected before `floor_s`."""

    floor_s: float
    _longest_pause_s: float = UNKNOWN_S
    _silence_s: dict[str, float] = field(default_factory=dict)

    def look(self, silence_s: Mapping[str, float]) -> None:
        """Take how long each member has been silent; one that is less so than before has made a pause."""
        ended = (
            before
            for member, before in self._silence_s.items()
            if member in silence_s and silence_s[member] < before
        )
        self._longest_pause_s = max(FADING * self._longest_pause_s, *ended, 0.0)
        self._silence_s = dict(silence_s)

    @property
    def limit_s(self) -> float:
        """How long a member may be silent."""
        return max(self.floor_s, PAUSES * self._longest_pause_s)

    def silent(self) -> frozenset[str]:
        """Name the members that have been silent for too long."""
        return frozenset(member for member, seconds in self._silence_s.items() if seconds > self.limit_s)
