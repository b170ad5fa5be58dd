"""The checkpoint engine beside what a user could pick instead, all figures of its promises in one run.

The peers' environment is built by `make bench-peers`; without it their figures are missing and the ratios to
them count as missed. ONLY=blocked,codec in the environment runs some of the figures.
"""

from tests.bench.figures.chosen import Figures, chosen, measure
from tests.bench.figures.codecs import codec
from tests.bench.figures.cuda import cuda
from tests.bench.figures.growth import dedup, memory, small_tensors
from tests.bench.figures.index import index
from tests.bench.figures.picture import draw_picture
from tests.bench.figures.pieces import fingerprint_speed, parity_speed
from tests.bench.figures.rebuild import rebuild
from tests.bench.figures.saving import blocked
from tests.bench.figures.slowdown import slowdown
from tests.bench.harness import Effort, Row

FIGURES: Figures = {
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
    """Measure the chosen figures, and draw them when there are all."""
    rows = measure(FIGURES, effort)
    if effort is Effort.FULL and chosen(FIGURES) == list(FIGURES):
        draw_picture(rows)
    return rows
