"""A run on the terminal: live or in plain lines while it goes on, tables at its end. Decides nothing."""

import logging
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from tasks.findings import Findings
from tasks.runs import Run
from tasks.summary import FAILURE_HEAD, SHA256, describe_failures, describe_run
from tasks.watching import Happening, LogLine, Notice, Progress

_PLAIN_EVERY_S = 2.0
_FAILURES_ABREAST = 3
_STYLES = {
    "loss": "red",
    "failure": "red",
    "drill": "yellow",
    "stop": "yellow",
    "world": "cyan",
    "checkpoint": "green",
}
# What goes on once a verb has told that it is done.
_NEXT = {"verify": "evaluating", "evaluate": "publishing", "publish": "reporting", "report": "done"}


class PlainScreen:
    """Prints what happens as log lines: all that workers log, and where the run stands every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_at = float("-inf")
        self._shown_step = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, notice: Notice) -> None:
        """Take one notice of the run."""
        match notice:
            case LogLine(member, level, message):
                self._line(f"{logging.getLevelName(level).lower()} {member}: {message}")
            case Happening(kind, message):
                self._line(f"{kind}: {message}")
            case Progress():
                self._show(notice)

    def _show(self, progress: Progress) -> None:
        now = datetime.now().timestamp()
        is_last = progress.step == progress.num_steps
        if progress.step == self._shown_step or (now - self._shown_at < _PLAIN_EVERY_S and not is_last):
            return
        self._shown_at, self._shown_step = now, progress.step
        self._line(f"step {progress.step} of {progress.num_steps}, {', '.join(_measures(progress))}")

    def _line(self, text: str) -> None:
        clock = datetime.now().strftime("%H:%M:%S")
        for line in text.splitlines():
            self._console.print(f"{clock} {line}", markup=False, highlight=False, soft_wrap=True)


class LiveScreen:
    """A progress bar that stays at the bottom, with what happens above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measures]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=None, measures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, notice: Notice) -> None:
        """Take one notice of the run."""
        match notice:
            case LogLine(member, level, message) if level >= logging.WARNING:
                self._say(member, message)
            case Happening(kind, message):
                self._say(kind, message)
                if kind in _NEXT:
                    self._bar.update(self._task, description=_NEXT[kind])
            case Progress():
                measures = ", ".join(_measures(notice)) if notice.step else ""
                self._bar.update(
                    self._task,
                    description=notice.phase,
                    completed=notice.step,
                    total=notice.num_steps,
                    measures=measures,
                )
            case _:
                pass

    def _say(self, kind: str, message: str) -> None:
        style = _STYLES.get(kind, "dim")
        self._bar.console.print(f"{kind:>10}  {message}", style=style, markup=False, highlight=False)


def _measures(progress: Progress) -> list[str]:
    """Say how a run does, in a few words each."""
    durable = "none" if progress.durable_step < 0 else str(progress.durable_step)
    loss = "-" if math.isnan(progress.loss) else f"{progress.loss:.4f}"
    return [
        f"loss {loss}",
        f"{progress.tokens_per_s:,.0f} tokens/s",
        f"world of {progress.world_size}",
        f"durable {durable}",
    ]


def draw_findings(console: Console, run: Run, findings: Findings) -> None:
    """Draw a run's report: how it went, its failures, and where its things lie."""
    rows = Table.grid(Column(style="bold"), Column(overflow="fold"), padding=(0, 2))
    for what, how_much in (*describe_run(findings), *_places(run)):
        if what != SHA256:
            rows.add_row(what, Text(how_much))
    console.print(Panel(rows, title=f"run {run.name}", title_align="left", expand=False))
    for table in _failure_tables(describe_failures(findings)):
        console.print(table)
    if findings.training is not None and findings.training.weights_sha256:
        # On a line of its own, whole, to be compared with another run's.
        console.print(f"{SHA256} {findings.training.weights_sha256}", highlight=False, soft_wrap=True)


def _failure_tables(failures: Sequence[Sequence[str]]) -> Iterator[Table]:
    """Make tables with a column for each failure, as many side by side as a narrow terminal has room for."""
    for start in range(0, len(failures), _FAILURES_ABREAST):
        abreast = failures[start : start + _FAILURES_ABREAST]
        numbers = range(start + 1, start + 1 + len(abreast))
        table = Table("", *(f"failure {number} of {len(failures)}" for number in numbers))
        for what, *values in zip(FAILURE_HEAD, *abreast, strict=True):
            table.add_row(what, *map(Text, values))
        yield table


def _places(run: Run) -> list[tuple[str, str]]:
    """List where a run's things lie, those that are there."""
    local = [("report", run.report_path), ("picture", run.picture_path), ("published", run.published_path)]
    return [("store", run.store_url), *((what, str(path)) for what, path in local if path.exists())]
