"""The elastic engine beside what a user could pick instead: what a failure costs, and what elasticity costs
while nothing fails.

The peers that restart are installed by `make bench-peers`; without it they are missing, and the ratios to
them count as missed. ONLY=killed,steady in the environment runs some of the figures.
"""

from tests.bench.figures.chosen import Figures, measure
from tests.bench.figures.control import control
from tests.bench.figures.recovery import killed, node, standby, stopped
from tests.bench.figures.steady import overlap, shrunken, steady, straggler
from tests.bench.harness import Effort, Row

FIGURES: Figures = {
    "killed": killed,
    "standby": standby,
    "stopped": stopped,
    "node": node,
    "steady": steady,
    "overlap": overlap,
    "straggler": straggler,
    "shrunken": shrunken,
    "control": control,
}


def run(effort: Effort) -> list[Row]:
    """Measure the chosen figures."""
    return measure(FIGURES, effort)
