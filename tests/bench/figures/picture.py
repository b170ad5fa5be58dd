"""The figures beside the peers' as a picture for the documentation."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.figures.session import CONTROL, OURS, ROOT
from tests.bench.harness import Row, written

PICTURE = ROOT / "docs" / "checkpoint_bench.png"
_OURS, _PEER, _CONTROL = "#1f5fa8", "#9a9a9a", "#3a7d44"
_PANELS = (
    ("blocked per checkpoint, saving every step", "blocked per checkpoint (ms, less is better)"),
    ("save to durable, raw codec", "save to durable (GB/s, more is better)"),
    ("restore from a warm page cache", "restore, warm page cache (GB/s, more is better)"),
)


def draw_picture(rows: Sequence[Row], path: Path = PICTURE) -> None:
    """Draw one line of panels for each size of state."""
    sizes = [row.metric.partition(":")[0] for row in rows if row.metric.endswith(_PANELS[0][0])]
    figure = Figure(figsize=(15, 3.4 * len(sizes)), dpi=90, layout="constrained")
    lines = figure.subplots(len(sizes), len(_PANELS), squeeze=False)
    for size, line in zip(sizes, lines, strict=True):
        for (metric, title), axes in zip(_PANELS, line, strict=True):
            chosen = [row for row in rows if row.metric.startswith(f"{size}: {metric}")]
            _draw(axes, chosen, f"{size}: {title}")
            if "(ms" in title:
                axes.set_xscale("log")
    figure.suptitle(
        "Holdfast beside what a user could pick instead: medians of interleaved rounds, all with fsync"
    )
    figure.savefig(path, format="png", bbox_inches="tight")


def _draw(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """Draw ours, all peers, and the control if one of the rows compares with it."""
    figures = {OURS: rows[0].ours}
    for row in rows:
        figures |= row.peers
    colours = [_OURS if name == OURS else _CONTROL if name == CONTROL else _PEER for name in figures]
    bars = axes.barh(list(figures), list(figures.values()), color=colours)
    axes.bar_label(bars, [written(figure) for figure in figures.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
