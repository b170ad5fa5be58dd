"""The checkpoint engine beside what a user could pick instead, all figures of its promises in one run.

The peers' environment is built by `make bench-peers`; without it their figures are missing and the ratios to
them count as missed. ONLY=blocked,codec in the environment runs some of the figures.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence

from tests.bench.figures.codecs import codec
from tests.bench.figures.cuda import cuda
from tests.bench.figures.growth import dedup, memory, small_tensors
from tests.bench.figures.index import index
from tests.bench.figures.picture import draw_picture
from tests.bench.figures.pieces import fingerprint_speed, parity_speed
from tests.bench.figures.rebuild import rebuild
from tests.bench.figures.saving import blocked
from tests.bench.figures.session import console
from tests.bench.figures.slowdown import slowdown
from tests.bench.harness import Effort, Row

FIGURES: Mapping[str, Callable[[Effort], list[Row]]] = {
    "blocked": blocked,
    "slowdown": slowdown,
    "codec": codec,
    "fingerprint": fingerprint_speed,
    "parity": parity_speed,
    "parity_rebuild": rebuild,
    "dedup": dedup,
    "memory": memory,
    "small": small_tensors,
    "index": index,
    "cuda": cuda,
}


def run(effort: Effort) -> list[Row]:
    """Measure the chosen figures; one that breaks is a missed row, and the others are still measured."""
    rows: list[Row] = []
    chosen = choose(os.environ.get("ONLY", ""))
    for name in chosen:
        started = time.perf_counter()
        try:
            rows += FIGURES[name](effort)
        except Exception:  # noqa: BLE001  the border: one broken figure does not take the others along
            console.print_exception()
            rows.append(Row(f"{name}: broke", "", 0.0, goal="figures", met=False))
        console.print(f"  {name}: {time.perf_counter() - started:.0f} s")
    if effort is Effort.FULL and chosen == list(FIGURES):
        draw_picture(rows)
    return rows


def choose(only: str) -> Sequence[str]:
    """Return the figures that are named, all if none is. Raises ValueError for a name that is none."""
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if name not in FIGURES]:
        raise ValueError(f"no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
    return names or list(FIGURES)
