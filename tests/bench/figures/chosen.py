"""Which of a benchmark's figures are measured: all, or those that ONLY=name,name in the environment names."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from tests.bench.figures.session import console
from tests.bench.harness import Effort, Row

Figures = Mapping[str, Callable[[Effort], list[Row]]]


def measure(figures: Figures, effort: Effort) -> list[Row]:
    """Measure the chosen figures; one that breaks is a missed row, and the others are still measured."""
    rows: list[Row] = []
    for name in chosen(figures):
        started = time.perf_counter()
        try:
            rows += figures[name](effort)
        except Exception:  # noqa: BLE001  the border: one broken figure does not take the others along
            console.print_exception()
            rows.append(Row(f"{name}: broke", "", 0.0, goal="figures", met=False))
        console.print(f"  {name}: {time.perf_counter() - started:.0f} s")
    return rows


def chosen(figures: Iterable[str]) -> Sequence[str]:
    """Return the names of the figures to measure now."""
    return choose(os.environ.get("ONLY", ""), list(figures))


def choose(only: str, figures: Sequence[str]) -> Sequence[str]:
    """Return the figures that are named, all if none is. Raises ValueError for a name that is none."""
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if name not in figures]:
        raise ValueError(f"no figure {', '.join(unknown)}; there are: {', '.join(figures)}")
    return names or figures
