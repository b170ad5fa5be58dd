"""What a run's journal amounts to: the training part of report.json. Pure arithmetic over its moments."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import TypeVar

from elastic.control.course import Course, FailureSpan, WorldCourse
from elastic.control.events import (
    CheckpointCaptured,
    CheckpointDurable,
    CheckpointLost,
    Entry,
    MemberEnded,
    MemberReady,
    SegmentEnded,
    SegmentStarted,
)
from elastic.control.instructions import End, Instruction

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Moment:
    """What happened or was decided, and when: seconds of a monotonic clock."""

    at_s: float
    entry: Entry | Instruction


@dataclass(frozen=True, slots=True)
class WorldSpan:
    """A world: `size` ranks from `from_step` on, ordered `at_s` seconds after the first worker was ready."""

    generation: int
    size: int
    from_step: int
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointCount:
    """Checkpoints by fate.

    `captured` counts the steps that every rank of a world captured; `blocked_s_*` is how long the loop waited
    for capture, over all ranks' captures (None: none).
    """

    captured: int
    durable: dict[str, int]
    lost: int
    blocked_s_median: float | None
    blocked_s_max: float | None


@dataclass(frozen=True, slots=True)
class TrainReport:
    """The training part of a run's report, over all its segments (a resumed run has several).

    `losses` are (committed step, loss, seconds since the first worker was ready); `ettr` is the time spent
    computing committed steps over the wall time since then. `redone_steps` counts the steps that were
    committed again in a later world, whether or not a failure explains it.
    """

    run: str
    status: str
    reason: str | None
    num_steps: int
    committed_steps: int
    redone_steps: int
    dropped_attempts: int
    segments: int
    worlds: tuple[WorldSpan, ...]
    failures: tuple[FailureSpan, ...]
    ettr: float | None
    wall_s: float
    computing_s: float
    first_loss: float | None
    last_loss: float | None
    losses: tuple[tuple[int, float, float], ...] = field(repr=False)
    durable_at: tuple[tuple[int, float], ...] = field(repr=False)
    checkpoints: CheckpointCount
    newest_durable_step: int | None
    weights_sha256: str | None


def build_report(run: str, moments: Sequence[Moment]) -> TrainReport:
    """Compute a run's report from its journal's moments, in the order they were written.

    The segments of a run may come from different boots or machines, whose monotonic clocks know nothing of
    each other: the wall clock at each segment's start makes them one.
    """
    moments = list(_on_one_clock(moments))
    course = Course()
    for moment in moments:
        course.take(moment.at_s, moment.entry)
    steps = [course.steps[number] for number in sorted(course.steps)]
    zero = next((at for at, _ in _entries(moments, MemberReady)), moments[0].at_s if moments else 0.0)
    wall_s = moments[-1].at_s - zero if moments else 0.0
    computing_s = sum(step.seconds for _, step in steps)
    failures = tuple(course.span(blow, zero) for blow in course.blows)
    sha256 = [ended.weights_sha256 for _, ended in _entries(moments, MemberEnded) if ended.weights_sha256]
    durable_at = _durable_at(moments, zero)
    status, reason = _status(moments)
    return TrainReport(
        run=run,
        status=status,
        reason=reason,
        num_steps=course.num_steps,
        committed_steps=max(course.steps, default=0),
        redone_steps=len(course.commits) - len(course.steps),
        dropped_attempts=sum(failure.dropped_attempts for failure in failures),
        segments=course.num_segments,
        worlds=tuple(
            WorldSpan(generation, world.size, world.step, world.ordered_at - zero, world.order.reason)
            for generation, world in course.worlds.items()
            if world.step is not None
        ),
        failures=failures,
        ettr=computing_s / wall_s if wall_s > 0 and steps else None,
        wall_s=wall_s,
        computing_s=computing_s,
        first_loss=steps[0][1].loss if steps else None,
        last_loss=steps[-1][1].loss if steps else None,
        losses=tuple((step.step, step.loss, at - zero) for at, step in steps),
        durable_at=durable_at,
        checkpoints=_checkpoints(moments, course.worlds.values()),
        newest_durable_step=max((step for step, _ in durable_at), default=None),
        weights_sha256=sha256[-1] if sha256 else None,
    )


def _on_one_clock(moments: Iterable[Moment]) -> Iterator[Moment]:
    """Shift each segment's times by what the wall clock says, so that they run on and never back."""
    first: float | None = None
    offset, latest = 0.0, -inf
    for moment in moments:
        if isinstance(moment.entry, SegmentStarted):
            booted = moment.entry.wall_s - moment.at_s
            first = booted if first is None else first
            offset = max(booted - first, latest - moment.at_s)
        at = moment.at_s + offset
        latest = max(latest, at)
        yield Moment(at, moment.entry)


def _entries(moments: Iterable[Moment], kind: type[E]) -> list[tuple[float, E]]:
    return [(moment.at_s, moment.entry) for moment in moments if isinstance(moment.entry, kind)]


def _status(moments: Sequence[Moment]) -> tuple[str, str | None]:
    told = [each.entry for each in moments if isinstance(each.entry, SegmentStarted | End | SegmentEnded)]
    if not told or isinstance(told[-1], SegmentStarted):
        return "running", None
    return str(told[-1].status), told[-1].reason


def _durable_at(moments: Sequence[Moment], zero: float) -> tuple[tuple[int, float], ...]:
    first = {entry.step: at - zero for at, entry in reversed(_entries(moments, CheckpointDurable))}
    return tuple(sorted(first.items()))


def _checkpoints(moments: Sequence[Moment], worlds: Iterable[WorldCourse]) -> CheckpointCount:
    captured = {
        step for world in worlds for step, members in world.captured.items() if world.is_everyone(members)
    }
    blocked = [entry.blocked_s for _, entry in _entries(moments, CheckpointCaptured)]
    durable: dict[str, set[int]] = {}
    for _, entry in _entries(moments, CheckpointDurable):
        durable.setdefault(entry.tier, set()).add(entry.step)
    everywhere = set().union(*durable.values()) if durable else set()
    lost = {entry.step for _, entry in _entries(moments, CheckpointLost)} - everywhere
    return CheckpointCount(
        captured=len(captured),
        durable={tier: len(steps) for tier, steps in sorted(durable.items())},
        lost=len(lost),
        blocked_s_median=median(blocked) if blocked else None,
        blocked_s_max=max(blocked, default=None),
    )
