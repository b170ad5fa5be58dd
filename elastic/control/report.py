"""What a run's journal amounts to: the training part of report.json. Pure arithmetic over its moments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeVar

from elastic.control.events import (
    CheckpointCaptured,
    CheckpointDurable,
    CheckpointLost,
    Entry,
    FaultStruck,
    MemberEnded,
    MemberLost,
    MemberReady,
    SegmentEnded,
    SegmentStarted,
    Settled,
    StepCommitted,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import End, FormWorld, Instruction

DRIVER_LOST = "driver lost"
E = TypeVar("E")
G = TypeVar("G", WorldFormed, Settled)


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
class FailureSpan:
    """One failure and its recovery.

    Durations in seconds, from the kill where a drill knows it, else from the first evidence.

    `detect_s` until the driver knew, `decide_s` until the next world was ordered, `form_s` until it had
    formed, `restore_s` until all its ranks held the same state, `total_s` until the next step was committed;
    `full_strength_s` until a world as large as the one before held its state. `redone_steps` had been
    committed before and were computed again; `dropped_attempts` counts the uncommitted step that was begun
    and thrown away (0 or 1). None: the run ended first.
    """

    cause: str
    member: str
    step: int
    at_s: float
    detect_s: float | None = None
    decide_s: float | None = None
    form_s: float | None = None
    restore_s: float | None = None
    total_s: float | None = None
    full_strength_s: float | None = None
    redone_steps: int = 0
    dropped_attempts: int = 0
    state_source: str | None = None


@dataclass(frozen=True, slots=True)
class CheckpointCount:
    """Checkpoints by fate; `blocked_s_*` is how long the loop waited for capture, over all captures (None:
    none).
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
    computing committed steps over the wall time since then.
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
    """Compute a run's report from its journal's moments, in order of time."""
    steps = _first_of_each_step(moments)
    starts = _entries(moments, SegmentStarted)
    zero = next((at for at, _ in _entries(moments, MemberReady)), moments[0].at_s if moments else 0.0)
    wall_s = moments[-1].at_s - zero if moments else 0.0
    computing_s = sum(step.seconds for _, step in steps.values())
    failures = tuple(_failure(moments, index, zero) for index in _failures_begin(moments))
    status, reason = _status(moments)
    ordered = [steps[number] for number in sorted(steps)]
    sha256 = [ended.weights_sha256 for _, ended in _entries(moments, MemberEnded) if ended.weights_sha256]
    durable_at = _durable_at(moments, zero)
    return TrainReport(
        run=run,
        status=status,
        reason=reason,
        num_steps=starts[-1][1].num_steps if starts else 0,
        committed_steps=max(steps, default=0),
        redone_steps=sum(failure.redone_steps for failure in failures),
        dropped_attempts=sum(failure.dropped_attempts for failure in failures),
        segments=len(starts),
        worlds=_worlds(moments, zero),
        failures=failures,
        ettr=computing_s / wall_s if wall_s > 0 and steps else None,
        wall_s=wall_s,
        computing_s=computing_s,
        first_loss=ordered[0][1].loss if ordered else None,
        last_loss=ordered[-1][1].loss if ordered else None,
        losses=tuple((step.step, step.loss, at - zero) for at, step in ordered),
        durable_at=durable_at,
        checkpoints=_checkpoints(moments),
        newest_durable_step=max((step for step, _ in durable_at), default=None),
        weights_sha256=sha256[-1] if sha256 else None,
    )


def _entries(moments: Sequence[Moment], kind: type[E]) -> list[tuple[float, E]]:
    return [(moment.at_s, moment.entry) for moment in moments if isinstance(moment.entry, kind)]


def _first_of_each_step(moments: Sequence[Moment]) -> dict[int, tuple[float, StepCommitted]]:
    steps: dict[int, tuple[float, StepCommitted]] = {}
    for at, step in _entries(moments, StepCommitted):
        steps.setdefault(step.step, (at, step))
    return steps


def _status(moments: Sequence[Moment]) -> tuple[str, str | None]:
    for moment in reversed(moments):
        match moment.entry:
            case End(status, reason):
                return str(status), reason
            case SegmentEnded(status, reason):
                return status, reason
            case SegmentStarted():
                return "running", None
            case _:
                continue
    return "running", None


def _durable_at(moments: Sequence[Moment], zero: float) -> tuple[tuple[int, float], ...]:
    first: dict[int, float] = {}
    for at, durable in _entries(moments, CheckpointDurable):
        first.setdefault(durable.step, at - zero)
    return tuple(sorted(first.items()))


def _worlds(moments: Sequence[Moment], zero: float) -> tuple[WorldSpan, ...]:
    settled = {entry.generation: entry.step for _, entry in reversed(_entries(moments, Settled))}
    return tuple(
        WorldSpan(form.generation, len(form.members), settled[form.generation], at - zero, form.reason)
        for at, form in _entries(moments, FormWorld)
        if form.generation in settled
    )


def _checkpoints(moments: Sequence[Moment]) -> CheckpointCount:
    captured = _entries(moments, CheckpointCaptured)
    blocked = [entry.blocked_s for _, entry in captured]
    durable: dict[str, set[int]] = {}
    for _, entry in _entries(moments, CheckpointDurable):
        durable.setdefault(entry.tier, set()).add(entry.step)
    everywhere = set().union(*durable.values()) if durable else set()
    lost = {entry.step for _, entry in _entries(moments, CheckpointLost)} - everywhere
    return CheckpointCount(
        captured=len({entry.step for _, entry in captured}),
        durable={tier: len(steps) for tier, steps in sorted(durable.items())},
        lost=len(lost),
        blocked_s_median=median(blocked) if blocked else None,
        blocked_s_max=max(blocked, default=None),
    )


def _failures_begin(moments: Sequence[Moment]) -> list[int]:
    """List where failures begin: a member of the world is lost, or a segment begins though the last one did
    not end.
    """
    begins: list[int] = []
    world: set[str] = set()
    is_open = False
    for index, moment in enumerate(moments):
        match moment.entry:
            case FormWorld(members=members):
                world = set(members)
            case MemberLost(member=member) if member in world:
                world.discard(member)
                begins.append(index)
            case SegmentStarted():
                if is_open and world:
                    begins.append(index)
                is_open = True
            case SegmentEnded():
                is_open, world = False, set()
            case _:
                pass
    return begins


def _failure(moments: Sequence[Moment], index: int, zero: float) -> FailureSpan:
    at, entry = moments[index].at_s, moments[index].entry
    before, after = moments[:index], moments[index:]
    committed = max((step.step for _, step in _entries(before, StepCommitted)), default=0)
    if isinstance(entry, MemberLost):
        struck_at = _struck_at(before, entry.member, at)
        span = FailureSpan(
            entry.cause.value, entry.member, committed, struck_at - zero, detect_s=at - struck_at
        )
    else:
        struck_at = before[-1].at_s
        span = FailureSpan(DRIVER_LOST, "driver", committed, struck_at - zero, detect_s=at - struck_at)
    return _recovery(span, before, after, struck_at)


def _struck_at(before: Sequence[Moment], member: str, lost_at: float) -> float:
    """When a failure began: the drill's blow, else the first evidence in that world, else its discovery."""
    for moment in reversed(before):
        if isinstance(moment.entry, FaultStruck) and moment.entry.member == member:
            return moment.at_s
        if isinstance(moment.entry, FormWorld):
            break
    generation = next((form.generation for _, form in reversed(_entries(before, FormWorld))), 0)
    evidence = [at for at, broken in _entries(before, WorldBroken) if broken.generation == generation]
    return min([*evidence, lost_at])


def _recovery(
    span: FailureSpan, before: Sequence[Moment], after: Sequence[Moment], struck_at: float
) -> FailureSpan:
    known_at = after[0].at_s
    form = _first(after, FormWorld, lambda _: True)
    if form is None:
        return span
    ordered_at, order = form
    formed = _last(after, WorldFormed, order.generation)
    settled = _last(after, Settled, order.generation)
    resumed = _first(after, StepCommitted, lambda step: step.generation >= order.generation)
    size_before = max((len(old.members) for _, old in _entries(before, FormWorld)[-1:]), default=0)
    full = [new for _, new in _entries(after, FormWorld) if len(new.members) >= size_before]
    restored = _last(after, Settled, full[0].generation) if full else None
    until = full[0].generation if full else order.generation
    sources = {
        entry.source for _, entry in _entries(after, Settled) if order.generation <= entry.generation <= until
    }
    settled_step = settled[1].step if settled else span.step
    span = replace(
        span,
        decide_s=ordered_at - known_at,
        form_s=formed[0] - ordered_at if formed else None,
        restore_s=settled[0] - formed[0] if formed and settled else None,
        total_s=resumed[0] - struck_at if resumed else None,
        full_strength_s=restored[0] - struck_at if restored else None,
        redone_steps=max(0, span.step - settled_step),
        state_source="+".join(sorted(sources)) or None,
    )
    return replace(span, dropped_attempts=int(settled is not None and settled_step <= span.step))


def _first(
    moments: Sequence[Moment], kind: type[E], is_wanted: Callable[[E], bool]
) -> tuple[float, E] | None:
    return next(((at, entry) for at, entry in _entries(moments, kind) if is_wanted(entry)), None)


def _last(moments: Sequence[Moment], kind: type[G], generation: int) -> tuple[float, G] | None:
    found = [(at, entry) for at, entry in _entries(moments, kind) if entry.generation == generation]
    return found[-1] if found else None
