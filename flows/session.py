"""One flow run in this terminal: shown while it goes on, reported when it has ended."""

from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from rich.console import Console

from flows.screen import LiveScreen, PlainScreen, draw_findings
from tasks.findings import gather
from tasks.runs import open_run, spec_path
from tasks.watching import watching


class Show(Enum):
    """How a run is shown while it goes on."""

    LIVE = auto()
    PLAIN = auto()


def run_here(start: Callable[[], None], name: str, runs_dir: Path, console: Console, show: Show) -> None:
    """Start a flow and show it until it ends; then draw the run's report, also if it failed."""
    display = LiveScreen(console) if show is Show.LIVE else PlainScreen(console)
    # A person watches this run, not its heartbeat, whose thread Prefect would wait for at the end.
    quiet = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    try:
        with quiet, display, watching(display):
            start()
    except Exception as failure:
        _draw_report(name, runs_dir, console, failure)
        raise
    _draw_report(name, runs_dir, console, None)


def _draw_report(name: str, runs_dir: Path, console: Console, failure: Exception | None) -> None:
    """Draw how the run went, if it came into being."""
    if spec_path(runs_dir / name).is_file():
        run = open_run(name, runs_dir)
        draw_findings(console, run, gather(run, failure))
