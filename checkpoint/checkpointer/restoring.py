"""One restore on all ranks: a step that every one of them could read, or the next older one."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.checkpointer.refilling import Refill, check_run, plan_refill
from checkpoint.checkpointer.sharing import are_shared_out, by_ranks, digest_of, replicas
from checkpoint.checkpointer.world import World
from checkpoint.engine.asking import ask_for_steps
from checkpoint.engine.candidate import content_digest
from checkpoint.engine.pooling import Pool, find_unproved
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.restore import Fallback, RestoreReport, restore_into
from checkpoint.engine.source import Source
from checkpoint.engine.straight import reads_files
from checkpoint.errors import (
    CheckpointError,
    FormatError,
    Incomplete,
    Mismatch,
    NoCheckpoint,
    StoreUnavailable,
    Unsupported,
)
from checkpoint.format.codec import checksum
from checkpoint.format.manifest import Manifest
from checkpoint.format.tree import Json

log = logging.getLogger("holdfast.checkpoint")

_PASSED_OVER = (FormatError, Incomplete, NoCheckpoint)
_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Restoration:
    """What was restored: the step, what was saved along with it, and how it was read.

    `report.fallbacks` are newer checkpoints that had to be passed over, `report.unreached` the tiers that did
    not answer. `notes` tell what was left as it was,
    and `per_rank` has the values that differed by rank, of all ranks that saved, by path.
    """

    step: int
    cursor: Json
    metrics: Mapping[str, float]
    report: RestoreReport
    notes: tuple[str, ...]
    per_rank: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """The steps to try, newest first, and the names of the sources that did not answer.

    If one was `asked_for` it is the only one, and no older one will do.
    """

    steps: list[int]
    unreached: tuple[str, ...] = ()
    asked_for: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a rank means to read; whether it could prove parts of chunks together with the others.

    `has_asides` tells that some is read aside, and put in its place once all ranks have read.
    """

    digest: str = ""
    content: bytes = b""
    can_pool: bool = False
    has_asides: bool = False


_NO_PLAN = _Plan()


@dataclass(frozen=True, slots=True)
class _Verdict:
    """How an attempt goes on one rank; `is_final` tells that an older checkpoint would not help."""

    why: str = ""
    is_final: bool = False
    plan: _Plan = _NO_PLAN
    parts: bytes = b""


class _Disagreed(Exception):
    """A step that not all ranks can restore. Carries this rank's own error, if it has one."""

    def __init__(self, why: str, own: Exception | None, verdicts: Sequence[_Verdict]) -> None:
        super().__init__(why)
        self.own = own
        self.is_final = any(one.is_final for one in verdicts)


def restore_newest(
    state: Any, sources: Sequence[Source], world: World, found: Found, policy: ReadPolicy, *, run: str
) -> Restoration | None:
    """Restore the newest of the steps that all ranks can read. Returns None if there is none.

    Raises Mismatch if it is another run's.
    """
    sources = [one for one in sources if one.name not in found.unreached]
    passed: list[Fallback] = []
    for candidate in found.steps:
        try:
            refill, report = _attempt(state, sources, candidate, world, policy, run=run)
        except _Disagreed as error:
            if error.is_final or found.asked_for:
                raise error.own or CheckpointError(str(error)) from None
            log.warning("step %d cannot be restored (%s): trying an older one", candidate, error)
            passed.append(Fallback(candidate, str(error)))
            continue
        unreached = tuple(dict.fromkeys((*found.unreached, *report.unreached)))
        return _finish(refill, replace(report, fallbacks=tuple(passed), unreached=unreached))
    if passed:
        named = "; ".join(f"step {one.step}: {one.why}" for one in passed[:_MAX_NAMED])
        raise NoCheckpoint(f"no checkpoint is whole: {named}. Run `holdfast verify`, or start a new run")
    return None


def _attempt(
    state: Any, sources: Sequence[Source], step: int, world: World, policy: ReadPolicy, *, run: str
) -> tuple[Refill, RestoreReport]:
    """Read one step. What fails on one rank raises _Disagreed on all."""
    refill, plan = None, _NO_PLAN
    failure: Exception | None = None
    try:
        manifest = _manifest(sources, step)
        check_run(manifest, run)
        refill = plan_refill(state, manifest, (world.rank, world.size))
        can_pool, has_asides = _can_pool(refill, sources), bool(refill.asides)
        plan = _Plan(digest_of(refill.requests), _content_of(manifest), can_pool, has_asides)
    except Exception as error:  # noqa: BLE001 -- the others wait to hear of it; raised by _agree
        failure = error
    plans = [one.plan for one in _agree(world, failure, plan=plan)]
    if refill is None:
        raise AssertionError("a rank without a plan has agreed to it")
    if len({one.digest for one in plans}) > 1:
        raise Mismatch("the ranks restore different things: give the same state on every rank")
    if len({one.content for one in plans}) > 1:
        raise Mismatch(f"the ranks found different checkpoints of step {step}: give all the same store")
    is_pooled = world.size > 1 and all(one.can_pool for one in plans)
    report = _filled(refill, sources, world, replace(policy, pool=Pool()) if is_pooled else policy)
    if any(one.has_asides for one in plans):
        _settle(refill, world)
    return refill, report


def _filled(refill: Refill, sources: Sequence[Source], world: World, policy: ReadPolicy) -> RestoreReport:
    """Read what the ranks want, of which some may want the same. What fails on one rank raises on all.

    With a pool the ranks prove together what several of them read in parts. What does not add up is read
    again, by each rank as a whole: then it is found which chunk is damaged, and another source may have it.
    """
    reports: list[RestoreReport] = []
    failure: Exception | None = None
    for ranks, wanted in by_ranks(refill.requests).items():
        with replicas(ranks, world.rank, world.size) as group:
            try:
                if world.rank in ranks:
                    reading = replace(policy, group=group)
                    step = refill.manifest.step
                    reports.append(restore_into(sources, wanted, step=step, policy=reading).report)
            except Exception as error:  # noqa: BLE001 -- the other groups of this rank still need it
                failure = error
    pool = policy.pool
    verdicts = _agree(world, failure, parts=b"" if pool is None else pool.told())
    unproved = find_unproved([one.parts for one in verdicts])
    if not unproved:
        return _summed(reports)
    names = [refill.manifest.tensors[tensor].name for tensor, _ in unproved]
    log.warning(
        "what the ranks read of %d chunks does not add up (%s): read again, as a whole",
        len(unproved),
        ", ".join(
            f"{name!r} at byte {at}" for name, (_, at) in zip(names[:_MAX_NAMED], unproved, strict=False)
        ),
    )
    again = _filled(refill, sources, world, replace(policy, pool=None))
    return _summed([*reports, again])


def _settle(refill: Refill, world: World) -> None:
    """Put what was read aside in its place. What fails on one rank raises _Disagreed on all."""
    failure: Exception | None = None
    try:
        refill.settle()
    except Exception as error:  # noqa: BLE001 -- the others wait to hear of it; raised by _agree
        failure = error
    _agree(world, failure)


def _can_pool(refill: Refill, sources: Sequence[Source]) -> bool:
    """Whether this rank could read parts of chunks, and what all ranks read is all of every tensor, once."""
    is_near = len(sources) > 0 and reads_files(sources[0]) and not refill.is_on_device
    return is_near and are_shared_out(refill.requests, refill.records)


def _content_of(manifest: Manifest) -> bytes:
    """Return what tells checkpoints of one step apart, wherever they are read from."""
    rest = [manifest.run, manifest.data_cursor, dict(manifest.metrics)]
    return content_digest(manifest) + checksum(json.dumps(rest, sort_keys=True).encode())


def _agree(
    world: World, failure: Exception | None, *, plan: _Plan = _NO_PLAN, parts: bytes = b""
) -> list[_Verdict]:
    """Go on if all ranks do; return what they say. Raises _Disagreed on all of them otherwise."""
    verdicts = world.everybody(_verdict(failure, plan, parts))
    for rank, one in enumerate(verdicts):
        if one.why:
            raise _Disagreed(f"rank {rank}: {one.why}" if world.size > 1 else one.why, failure, verdicts)
    return verdicts


def _verdict(failure: Exception | None, plan: _Plan, parts: bytes) -> _Verdict:
    if failure is None:
        return _Verdict(plan=plan, parts=parts)
    may_go_on = isinstance(failure, _PASSED_OVER) and not isinstance(failure, Unsupported)
    return _Verdict(f"{type(failure).__name__}: {failure}", is_final=not may_go_on)


def _summed(reports: Sequence[RestoreReport]) -> RestoreReport:
    """Add up the reports of one rank's reads."""
    by_source: Counter[str] = Counter()
    for one in reports:
        by_source.update(one.bytes_by_source)
    return RestoreReport(
        sum(one.num_bytes for one in reports),
        sum(one.num_requests for one in reports),
        (),
        dict(by_source),
        sum(one.num_detours for one in reports),
        tuple(detour for one in reports for detour in one.detours),
        tuple(name for one in reports for name in one.unreached),
    )


def find_steps(sources: Sequence[Source], policy: ReadPolicy, step: int | None) -> Found:
    """Find the steps of all sources that answer, or of which the one that is wanted is to be tried.

    Raises StoreUnavailable if what does not answer may have what nobody has.
    """
    answers = ask_for_steps(sources, policy)
    for number, error in answers.outages.items():
        log.warning("%s is done without: %s", sources[number].name, error)
    unreached = tuple(sources[number].name for number in sorted(answers.outages))
    if step is None:
        return Found(answers.steps, unreached)
    if unreached and step not in answers.steps:
        why = answers.outages[min(answers.outages)]
        raise StoreUnavailable(
            f"step {step} is not where it could be asked for, and {', '.join(unreached)} may have it: {why}"
        )
    return Found([step], unreached, asked_for=True)


def _manifest(sources: Sequence[Source], step: int) -> Manifest:
    """Read a step's manifest from the nearest source that has it whole."""
    failure: CheckpointError = NoCheckpoint(f"there is no checkpoint of step {step}")
    for source in sources:
        try:
            return source.manifest(step)
        except (FormatError, StoreUnavailable) as error:
            failure = error
        except NoCheckpoint:
            continue
    raise failure


def _finish(refill: Refill, report: RestoreReport) -> Restoration:
    refill.finish()
    for note in refill.notes:
        log.warning("%s", note)
    manifest = refill.manifest
    return Restoration(
        manifest.step, manifest.data_cursor, manifest.metrics, report, tuple(refill.notes), refill.per_rank
    )
