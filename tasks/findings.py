"""What a run left behind about itself, put together: the content of report.json. Knows no Prefect."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import elastic
from tasks.files import write_whole
from tasks.runs import Run

SCHEMA_VERSION = 1
_PACKAGES = ("holdfast", "torch", "ray", "prefect", "numpy")


@dataclass(frozen=True, slots=True)
class Scored:
    """The validation loss of one checkpoint beside the entropy of the data's bytes, in nats."""

    step: int
    loss: float
    unigram: float | None
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known about a run; `training` and `scored` are None until there are any."""

    run: str
    status: str
    reason: str | None
    training: elastic.TrainReport | None
    scored: Scored | None
    versions: Mapping[str, str | None]


def gather(run: Run, failure: BaseException | None = None) -> Findings:
    """Gather what is known about a run. `failure` is what ended the pipeline early, if anything did."""
    try:
        training = elastic.read_report(run.directory)
    except elastic.RunGone:
        training = None
    status, reason = _ending(training, failure)
    scored = None if training is None else read_score(run, training.committed_steps)
    return Findings(run.name, status, reason, training, scored, find_versions())


def _ending(training: elastic.TrainReport | None, failure: BaseException | None) -> tuple[str, str | None]:
    """Say how the run ended: as its training did, unless a later verb failed."""
    status = "failed" if training is None else training.status
    reason = None if training is None else training.reason
    if failure is None:
        return status, reason
    if not isinstance(failure, Exception):
        return "stopped", reason or f"interrupted ({type(failure).__name__})"
    return "failed", str(failure) or type(failure).__name__


def find_versions() -> dict[str, str | None]:
    """Name the versions of Python and of the packages that a run depends on."""
    return {"python": platform.python_version(), **{package: find_version(package) for package in _PACKAGES}}


def find_version(package: str) -> str | None:
    """Name the installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_score(run: Run, scored: Scored) -> None:
    """Keep an evaluation in the run's directory."""
    write_whole(run.evaluation_path(scored.step), json.dumps(_plain(asdict(scored)), indent=1).encode())


def read_score(run: Run, step: int) -> Scored | None:
    """Read the evaluation of the checkpoint at this step; None if there is none."""
    path = run.evaluation_path(step)
    return Scored(**json.loads(path.read_bytes())) if path.is_file() else None


def as_json(findings: Findings) -> dict[str, Any]:
    """Spell the findings as report.json has them (docs/report.schema.json)."""
    training, scored = findings.training, findings.scored
    report = {
        "schema_version": SCHEMA_VERSION,
        "run": findings.run,
        "status": findings.status,
        "reason": findings.reason,
        "steps": None if training is None else _steps(training),
        "worlds": [] if training is None else [asdict(world) for world in training.worlds],
        "failures": [] if training is None else [_failure(failure) for failure in training.failures],
        "ettr": None if training is None else training.ettr,
        "wall_s": None if training is None else training.wall_s,
        "loss": {
            "first": None if training is None else training.first_loss,
            "last": None if training is None else training.last_loss,
            "validation": None if scored is None else scored.loss,
            "unigram": None if scored is None else scored.unigram,
        },
        "checkpoints": None if training is None else _checkpoints(training.checkpoints),
        "weights_sha256": None if training is None else training.weights_sha256,
        "versions": dict(findings.versions),
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def write_report(run: Run, findings: Findings) -> None:
    """Write report.json, whole or not at all."""
    write_whole(run.report_path, (json.dumps(as_json(findings), indent=2, allow_nan=False) + "\n").encode())


def _steps(training: elastic.TrainReport) -> dict[str, int]:
    return {
        "ordered": training.num_steps,
        "committed": training.committed_steps,
        "redone": training.redone_steps,
        "dropped_attempts": training.dropped_attempts,
        "segments": training.segments,
    }


def _failure(failure: elastic.FailureSpan) -> dict[str, Any]:
    return {
        "cause": failure.cause,
        "member": failure.member,
        "step": failure.step,
        "detect_s": failure.detect_s,
        "decide_s": failure.decide_s,
        "form_s": failure.form_s,
        "restore_s": failure.restore_s,
        "redone_steps": failure.redone_steps,
        "dropped_attempts": failure.dropped_attempts,
        "total_s": failure.total_s,
        "full_strength_s": failure.full_strength_s,
        "state_source": failure.state_source,
        "stacks": failure.stacks,
    }


def _checkpoints(count: elastic.CheckpointCount) -> dict[str, Any]:
    return {
        "captured": count.captured,
        "durable": dict(count.durable),
        "lost": count.lost,
        "blocked_s": {"median": count.blocked_s_median, "max": count.blocked_s_max},
    }


def _plain(value: Any) -> Any:
    """Spell numbers that JSON cannot as strings: a loss that is not a number is reported, not hidden."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value
