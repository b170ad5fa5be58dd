"""Restore: the newest whole checkpoint, each of its chunks from the nearest source that has a good copy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from checkpoint.engine.candidate import Candidate, Sources, content_digest
from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.reading import Detour, Holes, ReadPolicy, Tally
from checkpoint.engine.regions import Regions
from checkpoint.engine.replicas import Circle, digest_of
from checkpoint.engine.source import Source, sources_of
from checkpoint.engine.targets import Target, Wanted, mismatch, number_targets
from checkpoint.engine.tensors import torch_dtype, unflatten_state
from checkpoint.errors import FormatError, Incomplete, NoCheckpoint, Unsupported
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.layout import Box
from checkpoint.format.manifest import Manifest
from checkpoint.store.contract import Store

_MAX_NAMED = 5
_DEFAULT = ReadPolicy()

Given = Store | Source | Sequence[Source]
Choice = Sequence[Wanted] | Callable[[Manifest], Sequence[Wanted]]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Fallback:
    """A checkpoint that was passed over, and why."""

    step: int
    why: str


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore read, and what it could not use.

    `num_bytes` were read in `num_requests` ranges, split by source in `bytes_by_source`. `fallbacks` are the
    newer checkpoints that were passed over; `detours` the first hundred of `num_detours` chunks, pages and
    manifests that a source did not have as they were written, so that they were had elsewhere, or read again.
    The sources named in `unreached` did not answer.
    """

    num_bytes: int
    num_requests: int
    fallbacks: tuple[Fallback, ...] = ()
    bytes_by_source: Mapping[str, int] = field(default_factory=dict)
    num_detours: int = 0
    detours: tuple[Detour, ...] = ()
    unreached: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A restored state (tensors on the CPU), the manifest it came by, and how."""

    state: Any
    manifest: Manifest
    report: RestoreReport


@dataclass(frozen=True, slots=True)
class Restored:
    """The checkpoint that targets were filled from, and how."""

    manifest: Manifest
    report: RestoreReport


def load(given: Given, step: int | None = None, policy: ReadPolicy = _DEFAULT) -> Loaded:
    """Restore a checkpoint: that of `step`, or the newest that is whole; from a store, or several sources.

    Every chunk's checksum and fingerprint is verified, and that the chunks are all of every tensor. Without a
    step, a checkpoint that fails is passed over for the next older one, and `report.fallbacks` says so.

    Raises NoCheckpoint if there is none, Unsupported if a later release wrote the newest one,
    StoreUnavailable if no source can be reached; for an explicit step whatever is wrong with it.
    """
    states: list[Any] = []

    def allocate(manifest: Manifest) -> list[Wanted]:
        states.clear()
        dtypes = [torch_dtype(tensor.dtype) for tensor in manifest.tensors]
        arrays = [np.empty(tensor.shape, dtype_of(tensor.dtype).carrier) for tensor in manifest.tensors]
        tensors = [torch.from_numpy(array).view(dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
        named = {one.name: tensor for one, tensor in zip(manifest.tensors, tensors, strict=True)}
        states.append(unflatten_state(manifest.skeleton, named))
        return [
            Wanted(one.name, one.dtype, one.shape, Box.whole(one.shape), tensor)
            for one, tensor in zip(manifest.tensors, tensors, strict=True)
        ]

    restored = restore_into(given, allocate, step=step, policy=policy)
    return Loaded(states[0], restored.manifest, restored.report)


def restore_into(
    given: Given, wanted: Choice, *, step: int | None = None, policy: ReadPolicy = _DEFAULT
) -> Restored:
    """Fill boxes of tensors from a checkpoint, whatever layout it was saved in; see `load` for which one.

    Only chunks that hold something wanted are read. What is wanted may be told by a function, of the manifest
    of each checkpoint that is tried, once its whole index is proved. After an error what the targets hold is
    undefined. Raises, besides what `load` does, Mismatch if the checkpoint lacks a tensor, or has it in
    another dtype or shape.
    """
    tally = Tally()
    sources = Sources(sources_of(given), tally)
    alone = _Alone(wanted, policy)
    ask = partial(sources.steps, policy)
    if policy.group is None:
        manifest, fallbacks = _first_whole(_steps(step, ask), sources, tally, alone.attempt)
    else:
        circle = Circle(policy.group)
        steps = _steps(step, lambda: circle.steps(ask))
        manifest, fallbacks = _first_whole(steps, sources, tally, _Together(alone, circle).attempt)
    return Restored(manifest, _report(tally, fallbacks, sources.unreached))


@dataclass(frozen=True, slots=True)
class _Opened:
    """A candidate's manifest, and where in it the wanted boxes lie."""

    manifest: Manifest
    wanted: Sequence[Wanted]
    targets: Sequence[Target]
    holes: Holes


class _Alone:
    """One rank fills its targets from a candidate."""

    def __init__(self, wanted: Choice, policy: ReadPolicy) -> None:
        self._wanted = wanted
        self._policy = policy

    def attempt(self, candidate: Candidate) -> Manifest:
        """Fill all targets."""
        opened = self.open(candidate)
        self.fill(candidate, opened, opened.holes)
        return opened.manifest

    def open(self, candidate: Candidate) -> _Opened:
        """Find the wanted boxes in a candidate."""
        manifest, wanted = candidate.manifest, self._wanted
        if not isinstance(wanted, Sequence):
            candidate.check_index(range(len(manifest.tensors)))
            wanted = wanted(manifest)
        targets = [Target(one) for one in wanted]
        numbers = number_targets(wanted, manifest)
        candidate.check_index(set(numbers))
        holes = Holes.all(Regions.of([one.box for one in wanted], numbers))
        return _Opened(manifest, wanted, targets, holes)

    def fill(self, candidate: Candidate, opened: _Opened, holes: Holes) -> None:
        """Fill some of the holes."""
        candidate.fill(holes, opened.targets, self._policy)


class _Together:
    """Each replica fills a share of its targets from a candidate, and gets the rest from the others."""

    def __init__(self, alone: _Alone, circle: Circle) -> None:
        self._alone = alone
        self._circle = circle

    def attempt(self, candidate: Candidate) -> Manifest:
        """Fill all targets, or fail as all do."""
        circle, alone = self._circle, self._alone
        opened = circle.together(lambda: alone.open(candidate))
        circle.alike("wanted boxes", digest_of(opened.wanted))
        circle.alike(f"checkpoints of step {opened.manifest.step}", content_digest(opened.manifest))
        holes, owners = circle.dealt(lambda num_ranks: candidate.deal(opened.holes, num_ranks))
        circle.together(lambda: alone.fill(candidate, opened, circle.own(holes, owners)))
        circle.exchange(holes, owners, opened.targets)
        return opened.manifest


def check_fits(specs: Sequence[TensorSpec], manifest: Manifest) -> None:
    """Raise Mismatch, naming the first tensors that differ, if a checkpoint is not of this state."""
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    stored = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.tensors}
    wrong = [
        f"{name}: {_described(stored.get(name))} in the checkpoint, {_described(wanted.get(name))} here"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    if wrong:
        raise mismatch(manifest, wrong)


def _steps(step: int | None, steps: Callable[[], list[int]]) -> list[int] | int:
    """Return what to try: the step that was asked for, or all there are, newest first."""
    return steps() if step is None else step


def _first_whole(
    steps: list[int] | int, sources: Sources, tally: Tally, attempt: Callable[[Candidate], Found]
) -> tuple[Found, tuple[Fallback, ...]]:
    """Attempt one step, or several until one is whole; return the result, and what was passed over."""
    if isinstance(steps, int):
        return attempt(Candidate(steps, sources, tally)), ()
    fallbacks: list[Fallback] = []
    for step in steps:
        try:
            return attempt(Candidate(step, sources, tally)), tuple(fallbacks)
        except Unsupported:
            raise  # nothing is wrong with it: to train on from an older one would throw work away
        except (FormatError, Incomplete, NoCheckpoint) as error:
            fallbacks.append(Fallback(step, f"{type(error).__name__}: {error}"))
    raise NoCheckpoint(_none_whole(fallbacks) if fallbacks else "there is no checkpoint in the store yet")


def _report(tally: Tally, fallbacks: tuple[Fallback, ...], unreached: tuple[str, ...]) -> RestoreReport:
    return RestoreReport(
        sum(tally.num_bytes.values()),
        tally.num_requests,
        fallbacks,
        dict(tally.num_bytes),
        tally.num_detours,
        tuple(tally.detours),
        unreached,
    )


def _none_whole(fallbacks: Sequence[Fallback]) -> str:
    named = "; ".join(f"step {one.step}: {one.why}" for one in fallbacks[:_MAX_NAMED])
    others = ", ".join(str(one.step) for one in fallbacks[_MAX_NAMED:])
    return (
        f"no checkpoint is whole: {named}{f'; and steps {others}' if others else ''}. "
        "Run `holdfast verify`, restore the store from a backup, or start a new run"
    )


def _described(what: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{what[0]}{list(what[1])}" if what else "absent"
