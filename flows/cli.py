"""The door: `holdfast`. Verbs import what they need, so that looking at checkpoints needs no framework."""

import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from flows.cli_checkpoints import AsJson, RunsDir
from flows.cli_checkpoints import app as checkpoints
from flows.cli_conversions import app as conversions
from flows.console import EXIT_FAILED, EXIT_WRONG, clear_errors, mode, screen, tell_failure

if TYPE_CHECKING:
    from tasks.spec import RunSpec  # pydantic, which the core does without

app = typer.Typer(
    name="holdfast",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Elastic training on machines that break, and checkpoints that prove themselves.

    [bold]holdfast train[/] trains a small GPT on the text of Python's standard library; [bold]holdfast
    train examples/first_run.toml[/] also kills one of its workers on the way. [bold]holdfast serve[/] offers
    the same in the Prefect UI.

    Every run leaves its directory: runs/NAME/{report.json, timeline.png, published/, store/}.""",
)
app.add_typer(checkpoints)
app.add_typer(conversions)

# Quiet, and nothing is sent anywhere. What the environment says already stands.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_QUIET = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
# A person who clicks Run should not wait ten seconds. 30 s is the shortest heartbeat there is.
_SERVING = {"PREFECT_RUNNER_POLL_FREQUENCY": "2", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}

SpecFile = Annotated[
    Path | None, typer.Argument(metavar="[SPEC.toml]", help="The run's specification.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=v",
        help="Set one key of the specification, such as training.steps=200. Repeatable.",
    ),
]
Name = Annotated[str | None, typer.Option(help="The run's name. Default: JOB-TIME-XXXX.", show_default=False)]
Plain = Annotated[bool, typer.Option("--plain", help="Log lines instead of a live display.")]


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and the frameworks' logs.")
    ] = False,
) -> None:
    mode.is_debugging, mode.is_json, mode.is_told = debug, False, False


@app.command()
def train(
    spec: SpecFile = None,
    settings: Settings = None,
    name: Name = None,
    data: Annotated[
        str | None, typer.Option(help="Text to train on: data.source.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps: training.steps.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Workers: world.workers.", show_default=False)] = None,
    plain: Plain = False,
) -> None:
    """Train, verify, evaluate and publish a model, through whatever fails on the way.

    The specification is a TOML file, single keys, or both; what none of them names has its default, and a key
    that two of them set is an error. --data, --steps and --workers are short for one key each. All keys, with
    their meaning and bounds: [bold]holdfast keys[/].

    Ctrl-C ends the run after a last checkpoint; [bold]holdfast resume NAME[/] continues it.
    """
    aliases = {"data.source": data, "training.steps": steps, "world.workers": workers}
    run_spec, run_name = _load(spec, settings, aliases, name)

    def start() -> None:
        from flows.training import training as flow

        flow(run_spec, run_name)

    _drive(start, run_name, Path(run_spec.pipeline.runs_dir), plain=plain)


@app.command()
def drill(spec: SpecFile = None, settings: Settings = None, name: Name = None, plain: Plain = False) -> None:
    """Train with something broken on purpose, and report the recovery.

    If the specification's drill names no fault, one worker is killed a third of the way.
    """
    run_spec, run_name = _load(spec, settings, {}, name)

    def start() -> None:
        from flows.drill import drill as flow

        flow(run_spec, run_name)

    _drive(start, run_name, Path(run_spec.pipeline.runs_dir), plain=plain)


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="The run's name.")],
    runs_dir: RunsDir = "runs",
    plain: Plain = False,
) -> None:
    """Continue a run that was stopped or has crashed, from its living workers or its newest checkpoint."""
    from tasks.runs import open_run  # needs pydantic, as the core does not

    with clear_errors():
        open_run(name, Path(runs_dir))

    def start() -> None:
        from flows.training import resume as flow

        flow(name, runs_dir)

    _drive(start, name, Path(runs_dir), plain=plain)


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the Prefect server, on loopback.")] = 4200,
) -> None:
    """Offer all flows in the Prefect UI, with schedules: upkeep hourly; training nightly, paused at first.

    Uses the server that PREFECT_API_URL names, else the one on the port, else starts one that ends with this
    command. Runs whose process crashes are resumed by themselves, as often as their specification allows.
    """
    from flows.server import Kind, find_or_start

    _prepare(_SERVING)
    with clear_errors():
        screen.print("starting ...", style="dim")
        server = find_or_start(Kind.FULL, port, os.environ)
        if server is not None:
            server.await_health()
        from flows import deployments

        address = os.environ["PREFECT_API_URL"].removesuffix("/api")
        screen.print(f"Prefect UI: [bold]{address}[/]   (Deployments, train, Run, Custom run)   ctrl-C ends")
        deployments.serve()


@app.command()
def keys() -> None:
    """List every key of a run's specification, with its default, bounds and meaning."""
    from tasks.loading import describe_keys

    for key, default, bounds, meaning in describe_keys():
        screen.print(f"[bold]{key}[/] = {escape(default or 'none')}   [dim]{bounds}[/]", highlight=False)
        screen.print(Padding(Text(meaning), (0, 0, 0, 4)))


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option(help="Also probe this store: can it be written, does it commit safely?")
    ] = None,
    port: Annotated[int, typer.Option(help="The port that `serve` would use.")] = 4200,
    as_json: AsJson = False,
) -> None:
    """Look at this machine: versions, memory, the server's port, a store. Exits with 1 on trouble."""
    from flows.doctor import draw, examine

    with clear_errors():
        findings = examine(store, port, os.environ)
        if as_json:
            print(json.dumps(findings, indent=2))
        else:
            draw(screen, findings)
        if any(each["trouble"] for each in findings):
            raise typer.Exit(EXIT_FAILED)


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="holdfast")
    except SystemExit as end:
        if end.code == EXIT_WRONG and "--json" in sys.argv:  # what was no verb or option, typer told people
            mode.is_json = True
            tell_failure(_spell_usage(end.__context__), "UsageError", EXIT_WRONG)
        raise


def _spell_usage(error: BaseException | None) -> str:
    """Say in one line what typer, whose kinds of error are private, says in a panel: which verb, and what."""
    verb = getattr(getattr(error, "ctx", None), "command_path", "holdfast")
    message = getattr(error, "format_message", lambda: "stderr says what is wrong")()
    return f"{verb}: {message.rstrip('.')}. See: {verb} --help"


def _load(
    path: Path | None, settings: list[str] | None, aliases: Mapping[str, object], name: str | None
) -> "tuple[RunSpec, str]":
    """Make the specification and the name of a new run, before anything is started for it."""
    from tasks.loading import load_spec
    from tasks.runs import check_name, invent_name, refuse_taken

    with clear_errors():
        short = [f"{key}={json.dumps(value)}" for key, value in aliases.items() if value is not None]
        spec = load_spec(path, [*(settings or []), *short])
        chosen = check_name(name) if name else invent_name(spec, datetime.now(UTC), secrets.token_hex(2))
        refuse_taken(chosen, Path(spec.pipeline.runs_dir))
    return spec, chosen


def _drive(start: Callable[[], None], name: str, runs_dir: Path, *, plain: bool) -> None:
    """Run a flow here, with a Prefect API of our own if none is configured."""
    from flows.server import Kind, find_or_start

    _prepare({} if mode.is_debugging else _QUIET)
    with clear_errors(), _stop_told(name, runs_dir):
        with screen.status("starting Prefect ..."):
            server = find_or_start(Kind.EMBEDDED, 0, os.environ)
            # This brings torch, Ray and Prefect (which reads the environment now), while the server starts.
            from flows.session import Show, run_here

            if server is not None:
                server.await_health()
        show = Show.PLAIN if plain or not screen.is_terminal else Show.LIVE
        run_here(start, name, runs_dir, screen, show)


class _Terminated(BaseException):
    """SIGTERM came; Prefect sends it once more when the flow has handled it."""


@contextmanager
def _stop_told(name: str, runs_dir: Path) -> Iterator[None]:
    """Turn ctrl-C and SIGTERM into a word on how to go on, and the exit status that shells expect."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        _tell_stop(name, runs_dir, 128 + signal.SIGINT)
    except _Terminated:
        _tell_stop(name, runs_dir, 128 + signal.SIGTERM)


def _tell_stop(name: str, runs_dir: Path, code: int) -> NoReturn:
    from tasks.runs import spec_path

    if spec_path(runs_dir / name).is_file():
        screen.print(f"stopped. Continue with: [bold]holdfast resume {name}{_beside(runs_dir)}[/]")
    else:
        screen.print("stopped before the run was made")
    raise typer.Exit(code)


def _beside(runs_dir: Path) -> str:
    return "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"


def _prepare(extra: Mapping[str, str]) -> None:
    """Set what Prefect and Ray read from the environment when imported; what stands there already stays."""
    for key, value in {**_ENVIRONMENT, **extra}.items():
        os.environ.setdefault(key, value)


if __name__ == "__main__":
    main()
