"""The course of a run as a picture: loss, failures and checkpoints over time; the world's size below."""

import io
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import elastic
from tasks.findings import Findings

_LOSS, _WORLD, _FAILURE, _CHECKPOINT, _BASELINE = "#1f5fa8", "#3a7d44", "#b3261e", "#6b6b6b", "#9a6b00"


def draw_course(findings: Findings) -> bytes | None:
    """Draw a run's course as PNG; None if it never began."""
    training = findings.training
    if training is None:
        return None
    # A Figure of its own, not pyplot's: no display, no global state, and Agg draws it.
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_loss(above, training, findings)
    _draw_world(below, training)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        for failure in training.failures:
            axes.axvline(failure.at_s, color=_FAILURE, linewidth=1, linestyle="--")
    figure.suptitle(
        f"{findings.run}: {findings.status}, {training.committed_steps} of {training.num_steps} steps"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_loss(axes: Axes, training: elastic.TrainReport, findings: Findings) -> None:
    losses = [(at, loss) for _, loss, at in training.losses if math.isfinite(loss)]
    if losses:
        axes.plot(*zip(*losses, strict=True), color=_LOSS, linewidth=1.3, label="training loss")
    if findings.scored is not None:
        if findings.scored.unigram is not None:
            axes.axhline(
                findings.scored.unigram,
                color=_BASELINE,
                linewidth=1,
                linestyle=":",
                label="byte unigram entropy",
            )
        axes.plot(
            [training.wall_s],
            [findings.scored.loss],
            marker="D",
            color=_LOSS,
            linestyle="none",
            label="validation loss",
        )
    for index, failure in enumerate(training.failures):
        axes.plot([], [], color=_FAILURE, linestyle="--", label=None if index else "failure")
        axes.annotate(
            failure.cause,
            (failure.at_s, 0.97),
            xycoords=("data", "axes fraction"),
            color=_FAILURE,
            fontsize=8,
            rotation=90,
            ha="right",
            va="top",
        )
    for index, (_, at) in enumerate(training.durable_at):
        label = None if index else "durable checkpoint"
        axes.plot(
            [at],
            [0.02],
            transform=axes.get_xaxis_transform(),
            marker="^",
            color=_CHECKPOINT,
            linestyle="none",
            label=label,
        )
    axes.set_ylabel("loss (nats)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_world(axes: Axes, training: elastic.TrainReport) -> None:
    worlds = [(world.at_s, world.size) for world in training.worlds]
    if worlds:
        ends = [*(at for at, _ in worlds[1:]), max(training.wall_s, worlds[-1][0])]
        for (at, size), end in zip(worlds, ends, strict=True):
            axes.fill_between([at, end], [size, size], color=_WORLD, alpha=0.35, linewidth=0)
        axes.step(
            [at for at, _ in worlds] + ends[-1:],
            [size for _, size in worlds] + [worlds[-1][1]],
            where="post",
            color=_WORLD,
        )
        axes.set_ylim(0, max(size for _, size in worlds) + 0.5)
    axes.set_ylabel("world size")
    axes.set_xlabel("seconds since the first worker was ready")
