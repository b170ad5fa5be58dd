"""A report in words and tables, the same on screen and in the Prefect UI. Pure."""

import base64
import math
from collections.abc import Sequence

from tasks.findings import Findings, Scored

FAILURE_HEAD = (
    *("failure", "at step", "detect", "decide", "form", "restore", "total", "full strength"),
    *("redone", "dropped", "state from"),
)
SHA256 = "weights sha256"
_UNKNOWN = "-"


def describe_run(findings: Findings) -> list[tuple[str, str]]:
    """List what a person wants to know of a run, as (what, how much)."""
    rows = [
        ("status", findings.status if findings.reason is None else f"{findings.status}: {findings.reason}")
    ]
    training, scored = findings.training, findings.scored
    if training is not None:
        rows += [
            ("steps", f"{training.committed_steps} of {training.num_steps} committed"),
            (
                "work repeated",
                f"{training.redone_steps} steps redone, {training.dropped_attempts} attempts dropped",
            ),
            (
                "worlds",
                ", then ".join(f"{world.size} from step {world.from_step}" for world in training.worlds)
                or _UNKNOWN,
            ),
            ("failures", str(len(training.failures))),
            (
                "time",
                f"{training.wall_s:.1f} s, {_percent(training.ettr)} of it computing committed steps (ETTR)",
            ),
            ("training loss", f"{_loss(training.first_loss)} at first, {_loss(training.last_loss)} at last"),
        ]
    if scored is not None:
        rows.append(("validation loss", spell_score(scored)))
    if training is not None:
        count = training.checkpoints
        durable = ", ".join(f"{number} on {tier}" for tier, number in count.durable.items()) or "0"
        rows += [
            ("checkpoints", f"{count.captured} captured, durable: {durable}, lost: {count.lost}"),
            (
                "loop blocked",
                f"{_seconds(count.blocked_s_median)} median, {_seconds(count.blocked_s_max)} at most",
            ),
            (SHA256, training.weights_sha256 or _UNKNOWN),
        ]
    return rows


def spell_score(scored: Scored) -> str:
    """Spell a validation loss, beside what knowing only the frequencies of bytes would give."""
    loss = f"{_loss(scored.loss)} nats"
    if scored.unigram is None:
        return loss
    return f"{loss}, {_difference(scored.unigram - scored.loss)} the byte unigrams' {_loss(scored.unigram)}"


def describe_failures(findings: Findings) -> list[tuple[str, ...]]:
    """List a run's failures and their recoveries, one row each under FAILURE_HEAD."""
    failures = () if findings.training is None else findings.training.failures
    return [
        (
            f"{failure.cause} ({failure.member})",
            str(failure.step),
            _seconds(failure.detect_s),
            _seconds(failure.decide_s),
            _seconds(failure.form_s),
            _seconds(failure.restore_s),
            _seconds(failure.total_s),
            _seconds(failure.full_strength_s),
            str(failure.redone_steps),
            str(failure.dropped_attempts),
            failure.state_source or _UNKNOWN,
        )
        for failure in failures
    ]


def write_markdown(findings: Findings, picture: bytes | None) -> str:
    """Write the report as Markdown, the picture (PNG) inside."""
    parts = [f"# Run {findings.run}: {findings.status}", _table(("what", "how much"), describe_run(findings))]
    if failures := describe_failures(findings):
        parts += ["## Failures and recoveries", _table(FAILURE_HEAD, failures)]
    if picture is not None:
        parts += [
            "## Course",
            f"![loss, failures, checkpoints and world size over time]({as_data_uri(picture)})",
        ]
    versions = ", ".join(f"{name} {number}" for name, number in findings.versions.items() if number)
    return "\n\n".join([*parts, f"Versions: {versions}."]) + "\n"


def as_data_uri(png: bytes) -> str:
    """Spell a PNG as a URI that carries it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{100 * value:.1f} %"


def _loss(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4f}"


def _difference(nats: float) -> str:
    if math.isnan(nats):
        return "not comparable with"
    return f"{abs(nats):.2f} nats {'below' if nats >= 0 else 'above'}"
