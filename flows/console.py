"""The terminal: what verbs print to, how errors and progress are shown, and what exit codes mean.

0: done, and all was well.  1: it failed, or what was looked at is damaged or different.  2: wrong usage: the
same command would never do.  128 and a signal's number: interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment

from flows.tables import legible
from tasks.errors import SpecError

EXIT_FAILED, EXIT_WRONG = 1, 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


class LegibleConsole(Console):
    """Spells control characters out: a name in a foreign file must not move the cursor or set colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is to be shown; the control codes of progress bars are segments of their own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else legible(text), style, control)


screen = LegibleConsole()
complaints = LegibleConsole(stderr=True)


@dataclass(slots=True)
class Mode:
    """What all verbs share."""

    is_debugging: bool = False
    is_json: bool = False  # then an error is one, too
    is_told: bool = False  # as JSON, what went wrong


mode = Mode()


class Step(Protocol):
    """How far some work is."""

    @property
    def what(self) -> str:
        """The work at hand."""

    @property
    def num_done_bytes(self) -> int:
        """Bytes that are done."""

    @property
    def num_bytes(self) -> int:
        """Of so many; 0 if nobody knows."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """End the command with one clear message instead of a traceback; with --debug, the traceback."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        complaints.print("interrupted")
        tell_failure("interrupted", "Interrupted", EXIT_INTERRUPTED)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # who reads has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_FAILED) from None
    except Exception as error:
        code = EXIT_WRONG if _is_wrong_usage(error) else EXIT_FAILED
        if mode.is_debugging:
            tell_failure(_spell(error), type(error).__name__, code)
            raise
        complaints.print(f"[bold red]error:[/] {escape(_spell(error))}", highlight=False, soft_wrap=True)
        tell_failure(_spell(error), type(error).__name__, code)
        raise typer.Exit(code) from None


def tell_failure(text: str, kind: str, code: int) -> None:
    """Print what went wrong for a program that reads our JSON."""
    if mode.is_json and not mode.is_told:
        mode.is_told = True
        with suppress(OSError):  # where it goes may be what failed
            typer.echo(json.dumps({"error": text, "kind": kind, "exit_code": code}, indent=2))


@contextmanager
def resumable(what: str) -> Iterator[None]:
    """Turn ctrl-C into a word on how to go on, and the exit status that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        complaints.print(f"interrupted. {what}")
        tell_failure(f"interrupted. {what}", "Interrupted", EXIT_INTERRUPTED)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@contextmanager
def followed() -> Iterator[Callable[[Step], None]]:
    """Show progress, rate and time left while the block runs, if somebody watches; yield who is told."""
    if not complaints.is_terminal:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=complaints, transient=True) as shown:
        bar = shown.add_task("opening", total=None)

        def tell(step: Step) -> None:
            shown.update(
                bar, description=step.what, completed=step.num_done_bytes, total=step.num_bytes or None
            )

        yield tell


def _is_wrong_usage(error: Exception) -> bool:
    from checkpoint import Misuse, NoSuchStep  # verbs that need no checkpoint do not import it

    return isinstance(error, SpecError | Misuse | NoSuchStep)


def _spell(error: Exception) -> str:
    """Say an error of ours as it is, a foreign one with its kind."""
    is_ours = type(error).__module__.split(".")[0] in {"tasks", "elastic", "checkpoint"}
    return str(error) if is_ours else f"{type(error).__name__}: {error} (--debug shows where)"
