"""How long a micro-batch may take: longer than any did, and than was ever waited for one in vain. Pure.

Data may be slow for whoever computes it. So who is ended for it makes the next one's time longer, until the
step is committed: it costs a worker or two, and not the run.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from elastic.control.suspicion import Suspicion

ESCALATION = 4.0


@dataclass(slots=True)
class Diligence:
    """Watches how long members have been at their micro-batches; none may take less than `floor_s`, or need
    take more than `most_s`.
    """

    floor_s: float
    most_s: float
    _watch: Suspicion = field(init=False)
    _working_s: Mapping[str, float] = field(default_factory=dict)
    _in_vain_s: float = 0.0
    _blamed_at: int = -1  # the step that the last verdict was about

    def __post_init__(self) -> None:
        self._watch = Suspicion(self.floor_s, fading=1.0)

    def look(self, working_s: Mapping[str, float], slept_s: float) -> None:
        """Take how long each member has been at its present one (0: it is at none, or at its first)."""
        self._watch.look(working_s, slept_s)
        self._working_s = working_s

    def limit_s(self, step: int) -> float:
        """How long a micro-batch of the step that comes after this many committed ones may take."""
        usual_s = max(self._watch.limit_s, self._in_vain_s)
        return min(usual_s * (ESCALATION if step <= self._blamed_at else 1.0), self.most_s)

    def stuck(self, step: int) -> frozenset[str]:
        """Name those who take longer."""
        return self._watch.longer_than(self.limit_s(step))

    def blame(self, step: int) -> None:
        """Note that somebody is ended who was stuck in this step."""
        self._in_vain_s, self._blamed_at = self.limit_s(step), step

    def is_any_working(self, members: Collection[str]) -> bool:
        """Whether one of these is at a micro-batch."""
        return any(self._working_s.get(one, 0.0) > 0.0 for one in members)

    def are_all_working(self, members: Collection[str]) -> bool:
        """Whether all of these are."""
        return all(self._working_s.get(one, 0.0) > 0.0 for one in members)
