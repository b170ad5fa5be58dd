"""Guards of the loss: a step that is not finite is not applied, a loss that jumps is told. Pure.

Both look at numbers that are the same on every rank, so all ranks decide alike.
"""

from dataclasses import dataclass
from math import isfinite, sqrt

MIN_STEPS = 20  # before these nothing is known of how much the loss moves
NUM_DEVIATIONS = 8.0
NEWEST = 0.05  # weight of the newest loss in mean and variance


def why_not_finite(loss: float, norm: float) -> str | None:
    """Say what is not finite in a step, if anything is."""
    if isfinite(loss) and isfinite(norm):
        return None
    return f"the loss is {loss:g} and the gradient's norm {norm:g}"


@dataclass(slots=True)
class LossWatch:
    """Knows how much the loss moves from step to step, and tells a jump."""

    _mean: float = 0.0
    _variance: float = 0.0
    _num_steps: int = 0

    def look(self, loss: float) -> float | None:
        """Take a step's loss; return what was usual if this is far above it."""
        if not isfinite(loss):
            return None
        usual, deviation = self._mean, sqrt(self._variance)
        is_known = self._num_steps >= MIN_STEPS
        is_jump = is_known and loss - usual > NUM_DEVIATIONS * max(deviation, 0.01 * abs(usual))
        weight = max(NEWEST, 1.0 / (self._num_steps + 1))
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1.0 - weight) * (self._variance + weight * difference * difference)
        self._num_steps += 1
        return usual if is_jump else None
