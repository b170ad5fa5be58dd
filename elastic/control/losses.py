"""How many members were lost, how often one was corrupt, and when that is too much. Pure bookkeeping."""

from collections import defaultdict
from dataclasses import dataclass, field

from elastic.control.events import MemberLost, UserFailed
from elastic.control.policy import WorldPolicy

HEALINGS_TO_EVICT = 2  # once may be a cosmic ray, twice is a broken machine
MAX_REFUSALS = 2  # of newcomers: one machine may lack the data
LOSSES_BEYOND = 3  # more than two for each worker, in a row without a step


@dataclass(slots=True)
class Losses:
    """A run's losses: `num` in all, `num_in_a_row` since a step was committed. Of newcomers in which the job
    raised there were `num_refusals` since one joined in.
    """

    num: int = 0
    num_in_a_row: int = 0
    num_refusals: int = 0
    _told: set[UserFailed] = field(default_factory=set)
    _healed: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def count(self, lost: MemberLost, policy: WorldPolicy) -> str | None:
        """Count a loss; return why the run should end of it, if it should."""
        self.num += 1
        self.num_in_a_row += 1
        if self.num > policy.max_failures:
            return f"{self.num} workers were lost, recovery.max_failures allows fewer: {lost.evidence}"
        if self.num_in_a_row > 2 * policy.workers + LOSSES_BEYOND:
            return f"{self.num_in_a_row} workers were lost in a row without a step: {lost.evidence}"
        return None

    def is_news(self, failed: UserFailed) -> bool:
        """Note what a member tells; return whether it was not told before."""
        is_new = failed not in self._told
        self._told.add(failed)
        return is_new

    def refuse(self) -> bool:
        """Note that the job raised in a newcomer; return whether it is the job."""
        self.num_refusals += 1
        return self.num_refusals > MAX_REFUSALS

    def heal(self, member: str, step: int) -> str | None:
        """Note that a member's state was corrupt, and healed; return why it should go for that, if so."""
        self._healed[member].add(step)
        num = len(self._healed[member])
        return f"{member} held corrupt state {num} times" if num >= HEALINGS_TO_EVICT else None
