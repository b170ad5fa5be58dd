"""Resharding beside what a user could do instead: at load time, as a conversion, and how planning scales.

ONLY=planning,loading,converting,exporting,universal in the environment runs some of the figures.
"""

from tests.bench.figures.chosen import Figures, measure
from tests.bench.figures.converting import converting
from tests.bench.figures.exporting import exporting
from tests.bench.figures.planning import planning
from tests.bench.figures.reloading import reloading
from tests.bench.figures.universal import universal
from tests.bench.harness import Effort, Row

FIGURES: Figures = {
    "planning": planning,
    "loading": reloading,
    "converting": converting,
    "exporting": exporting,
    "universal": universal,
}


def run(effort: Effort) -> list[Row]:
    """Measure the chosen figures."""
    return measure(FIGURES, effort)
