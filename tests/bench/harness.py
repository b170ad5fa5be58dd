"""The benchmark harness: rows of figures with goals, as JSON and as a table with the missed ones last."""

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

from rich.table import Table

RESULTS = Path(__file__).parent / "results"


class Effort(Enum):
    """How much work a benchmark may do: QUICK for a look, FULL for figures to publish."""

    QUICK = "quick"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on our figure, or on its ratio to the best peer's."""

    sign: Literal["<=", ">="]
    bound: float
    of: Literal["ours", "ratio"] = "ours"

    def __str__(self) -> str:
        return f"{'ratio ' if self.of == 'ratio' else ''}{self.sign} {self.bound:g}"

    def is_met(self, ours: float, ratio: float | None) -> bool:
        """Compare; a ratio without any peer to compare with does not meet its goal."""
        figure = ours if self.of == "ours" else ratio
        compare = operator.le if self.sign == "<=" else operator.ge
        return figure is not None and bool(compare(figure, self.bound))


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ratio` is ours / the best peer's; `met` is None where no goal was set."""

    metric: str
    unit: str
    ours: float
    peers: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None


def row(
    metric: str,
    unit: str,
    *,
    ours: float,
    peers: Mapping[str, float] | None = None,
    better: Literal["lower", "higher"] = "lower",
    goal: Goal | None = None,
) -> Row:
    """Compare our figure with the peers' best and with the goal.

    `better` tells which end of the peers' figures is their best.
    """
    figures = dict(peers or {})
    ratio = None
    if figures:
        best = min(figures.values()) if better == "lower" else max(figures.values())
        ratio = ours / best if best else None
    met = goal.is_met(ours, ratio) if goal else None
    return Row(metric, unit, ours, figures, ratio, str(goal) if goal else None, met)


def missed_last(rows: Iterable[Row]) -> list[Row]:
    """Order rows as they were measured, those that missed their goal after all others."""
    return sorted(rows, key=lambda entry: entry.met is False)


def write_results(name: str, rows: Sequence[Row], directory: Path = RESULTS) -> Path:
    """Write the rows as `NAME.json`, whole or not at all, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(entry) for entry in rows], indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def written(figure: float) -> str:
    """Write a figure with four digits that mean something, never as a power of ten when it is large."""
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


def draw(name: str, rows: Sequence[Row]) -> Table:
    """Draw the rows as a table."""
    table = Table(title=name, title_justify="left")
    for heading in ("metric", "unit", "ours", "peers", "ratio", "goal", "met"):
        table.add_column(heading, justify="right" if heading in ("ours", "ratio") else "left")
    for entry in missed_last(rows):
        table.add_row(
            entry.metric,
            entry.unit,
            written(entry.ours),
            "\n".join(f"{peer} {written(figure)}" for peer, figure in entry.peers.items()),
            "" if entry.ratio is None else f"{entry.ratio:.3g}",
            entry.goal or "",
            {True: "yes", False: "MISSED", None: ""}[entry.met],
            style="red" if entry.met is False else None,
        )
    return table
