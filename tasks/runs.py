"""What a run is called and where its things lie. Knows nothing of Prefect, nor of how a run is made."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tasks.errors import NoSuchRun, RunExists, SpecError
from tasks.loading import read_spec
from tasks.spec import RunSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Run:
    """A run that exists: its name, its directory and the specification it was made from."""

    name: str
    directory: Path
    spec: RunSpec

    @property
    def store_url(self) -> str:
        """Where its checkpoints lie."""
        return store_url(self.spec, self.name, self.directory)

    @property
    def report_path(self) -> Path:
        """Where its report lies."""
        return self.directory / "report.json"

    @property
    def picture_path(self) -> Path:
        """Where the picture of its course lies."""
        return self.directory / "timeline.png"

    @property
    def published_path(self) -> Path:
        """Where its published weights lie."""
        return self.directory / "published"

    def evaluation_path(self, step: int) -> Path:
        """Where the evaluation of one of its checkpoints lies."""
        return self.directory / "evaluations" / f"{step:012d}.json"

    @property
    def restarts_path(self) -> Path:
        """Where its automatic restarts are counted, a line each."""
        return self.directory / "restarts.log"


def spec_path(directory: Path) -> Path:
    """Where a run's specification lies; a directory is a run's once this file is there."""
    return directory / "spec.json"


def store_url(spec: RunSpec, name: str, directory: Path) -> str:
    """Where a run's checkpoints go: the specification's store, or the run's own directory."""
    if spec.checkpoint.store is None:
        return str(directory / "store")
    return spec.checkpoint.store.replace("{run}", name)


def open_run(name: str, runs_dir: Path) -> Run:
    """Open the run of this name. Raises NoSuchRun if there is none."""
    directory = (runs_dir / check_name(name)).absolute()
    if not spec_path(directory).is_file():
        there = ", ".join(run.name for run in find_runs(runs_dir)) or "none"
        raise NoSuchRun(f"there is no run {name} in {runs_dir.absolute()}; the runs there: {there}")
    return Run(name, directory, read_spec(spec_path(directory)))


def refuse_taken(name: str, runs_dir: Path) -> None:
    """Raise RunExists if something lies where a run of this name would."""
    directory = (runs_dir / name).absolute()
    if directory.exists():
        raise RunExists(
            f"run {name} exists in {directory.parent}; "
            f"continue it with `holdfast resume {name}`, or choose another name"
        )


def find_runs(runs_dir: Path) -> list[Run]:
    """Find all runs in a directory that this version can read, by name."""
    return sorted(_readable(runs_dir), key=lambda run: run.name)


def _readable(runs_dir: Path) -> Iterator[Run]:
    for path in runs_dir.glob("*/spec.json"):
        try:
            yield Run(path.parent.name, path.parent.absolute(), read_spec(path))
        except SpecError:
            continue


def check_name(name: str) -> str:
    """Return the name if it can name a run; raise SpecError if it cannot."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise SpecError(
            f"{name!r} cannot name a run: "
            "up to 100 letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    return name


def invent_name(spec: RunSpec, now: datetime, token: str) -> str:
    """Name a run after its job, the time in UTC and four hexadecimal digits of `token`."""
    job = spec.job.path.rpartition(":")[2]
    word = job.removesuffix("Job") or job
    return check_name(f"{word.lower()[:40]}-{now.astimezone(UTC):%Y%m%d-%H%M%S}-{token[:4]}")
