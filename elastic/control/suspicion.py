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
    """Watches how long members are silent; none is suspected before `floor_s`. Of the longest pause `fading`
    is left with each look.
    """

    floor_s: float
    fading: float = FADING
    _longest_pause_s: float = UNKNOWN_S
    _silence_s: dict[str, float] = field(default_factory=dict)
    _excused_s: dict[str, float] = field(default_factory=dict)

    def look(self, silence_s: Mapping[str, float], slept_s: float = 0.0) -> None:
        """Take how long each member has been silent; one that is less so than before has made a pause.

        For the last `slept_s` seconds nobody could be heard.
        """
        if slept_s or self._excused_s:
            silence_s = self._excuse(silence_s, slept_s)
        before = self._silence_s
        ended = [before[one] for one, now in silence_s.items() if one in before and now < before[one]]
        self._longest_pause_s = max(self.fading * self._longest_pause_s, *ended, 0.0)
        self._silence_s = dict(silence_s)

    def _excuse(self, silence_s: Mapping[str, float], slept_s: float) -> dict[str, float]:
        """Take from each silence what of it was slept through."""
        excused_s = {one: s for one, s in self._excused_s.items() if s <= silence_s.get(one, 0.0)}
        if slept_s:
            excused_s = {one: min(excused_s.get(one, 0.0) + slept_s, s) for one, s in silence_s.items()}
        self._excused_s = excused_s
        return {one: seconds - self._excused_s.get(one, 0.0) for one, seconds in silence_s.items()}

    @property
    def limit_s(self) -> float:
        """How long a member may be silent."""
        return max(self.floor_s, PAUSES * self._longest_pause_s)

    def silent(self) -> frozenset[str]:
        """Name the members that have been silent for too long."""
        return self.longer_than(self.limit_s)

    @property
    def is_deaf(self) -> bool:
        """Whether all are silent for too long: perhaps it is us."""
        return min(self._silence_s.values(), default=0.0) > self.limit_s

    def longer_than(self, limit_s: float) -> frozenset[str]:
        """Name the members that have been silent for longer than this."""
        if max(self._silence_s.values(), default=0.0) <= limit_s:
            return frozenset()
        return frozenset(member for member, seconds in self._silence_s.items() if seconds > limit_s)
