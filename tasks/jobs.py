"""The run's job, opened in this process: for checks before the training and for the model after it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elastic
from tasks.spec import RunSpec


@dataclass(frozen=True, slots=True)
class Opened:
    """A job with its settings, checked and filled in."""

    job: elastic.Job
    settings: Any


def make_importable(spec: RunSpec) -> None:
    """Let this process import the job's code from where the specification says it lies."""
    directory = str(Path(spec.job.code_dir).absolute())
    if directory not in sys.path:
        sys.path.insert(0, directory)


def open_job(spec: RunSpec) -> Opened:
    """Load the job and its settings. Raises JobRejected, naming what is wrong."""
    make_importable(spec)
    job = elastic.load_job(spec.job.path)
    return Opened(job, elastic.load_settings(job, spec.job.settings))


def check_job(spec: RunSpec) -> None:
    """See that the job loads, its settings fit and its data is there. Raises JobRejected."""
    opened = open_job(spec)
    for name in ("train", "validation"):
        opened.job.dataset(
            elastic.Split(
                name=name,
                source=spec.data.source,
                seed=spec.training.seed,
                micro_batch=spec.training.global_batch // spec.training.virtual_ranks,
                settings=opened.settings,
            )
        )
