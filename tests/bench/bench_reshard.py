"""Resharding beside what a user could do instead: at load time, as a conversion, and how planning scales.

ONLY=planning,loading,converting,exporting,universal in the environment runs some of the figures.
"""

import os
import time
from collections.abc import Callable, Mapping

from tests.bench.figures.converting import converting
from tests.bench.figures.exporting import exporting
from tests.bench.figures.planning import planning
from tests.bench.figures.reloading import reloading
from tests.bench.figures.session import console
from tests.bench.figures.universal import universal
from tests.bench.harness import Effort, Row

FIGURES: Mapping[str, Callable[[Effort], list[Row]]] = {
    "planning": planning,
    "loading": reloading,
    "converting": converting,
    "exporting": exporting,
    "universal": universal,
}


def run(effort: Effort) -> list[Row]:
    """Measure the chosen figures; one that breaks is a missed row, and the others are still measured."""
    rows: list[Row] = []
    only = [name for name in os.environ.get("ONLY", "").split(",") if name]
    if unknown := [name for name in only if name not in FIGURES]:
        raise ValueError(f"no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
    for name in only or FIGURES:
        started = time.perf_counter()
        try:
            rows += FIGURES[name](effort)
        except Exception:  # noqa: BLE001  the border: one broken figure does not take the others along
            console.print_exception()
            rows.append(Row(f"{name}: broke", "", 0.0, goal="figures", met=False))
        console.print(f"  {name}: {time.perf_counter() - started:.0f} s")
    return rows
