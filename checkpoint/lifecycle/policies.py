"""Which checkpoints are kept: policies as values, and the pure choice between checkpoints by them."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from numbers import Integral
from typing import Literal

from checkpoint.engine.bounds import check_kind, check_several, check_whole

_METRIC = re.compile(r"[A-Za-z0-9._/-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class LatestN:
    """Keep the newest `n` checkpoints."""

    n: int

    def __post_init__(self) -> None:
        check_whole("n", self.n, 1)

    def __str__(self) -> str:
        return f"the newest {self.n}"


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Keep the checkpoints of every k-th step."""

    k: int

    def __post_init__(self) -> None:
        check_whole("k", self.k, 1)

    def __str__(self) -> str:
        return f"every {self.k} steps"


@dataclass(frozen=True, slots=True)
class EveryMinutes:
    """Keep the first checkpoint of every `minutes`, counted from 1970: so which one it is never changes."""

    minutes: float

    def __post_init__(self) -> None:
        check_kind("minutes", self.minutes, int | float)
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"EveryMinutes keeps one in a time above zero, not in {self.minutes} minutes")

    def __str__(self) -> str:
        return f"one every {self.minutes:g} minutes"


@dataclass(frozen=True, slots=True)
class BestByMetric:
    """Keep the `n` checkpoints with the lowest ("min") or highest ("max") value of a metric.

    The newer of two with the same value is the better one. A checkpoint without the metric, or with one that
    is not finite, is none of the best.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    n: int = 1

    def __post_init__(self) -> None:
        check_kind("metric", self.metric, str)
        check_kind("n", self.n, int)
        if self.mode not in ("min", "max") or self.n < 1 or not _METRIC.fullmatch(self.metric):
            raise ValueError(
                f"BestByMetric takes a metric's name of [A-Za-z0-9._/-], 'min' or 'max', and how many: "
                f"not {self.metric[:80]!r}, {str(self.mode)[:80]!r}, {self.n}"
            )

    def __str__(self) -> str:
        return f"the {self.n} with the {'lowest' if self.mode == 'min' else 'highest'} {self.metric}"


@dataclass(frozen=True, slots=True)
class Pinned:
    """Keep the checkpoints of these steps, whatever they take."""

    steps: frozenset[int]

    def __post_init__(self) -> None:
        check_several("steps", self.steps, Integral)

    def __str__(self) -> str:
        return f"pinned {', '.join(map(str, sorted(self.steps)))}"


@dataclass(frozen=True, slots=True)
class WithinBytes:
    """Let the oldest expire, even of those that other policies keep, until the rest takes so many bytes.

    Alone it keeps as many as fit. What is pinned, tagged or protected stays, even if it does not fit.
    """

    num_bytes: int

    def __post_init__(self) -> None:
        check_whole("num_bytes", self.num_bytes, 1)

    def __str__(self) -> str:
        return f"within {self.num_bytes} bytes"


Policy = LatestN | EverySteps | EveryMinutes | BestByMetric | Pinned | WithinBytes


def policy_to_text(policy: Policy) -> str:
    """Return a policy as text: "latest:3", "every:100", "minutes:30", "best:loss:min:2", "pinned:10,20"."""
    match policy:
        case LatestN(n):
            return f"latest:{n}"
        case EverySteps(k):
            return f"every:{k}"
        case EveryMinutes(minutes):
            return f"minutes:{minutes!r}"
        case BestByMetric(metric, mode, n):
            return f"best:{metric}:{mode}:{n}"
        case Pinned(steps):
            return f"pinned:{','.join(map(str, sorted(steps)))}"
        case WithinBytes(num_bytes):
            return f"bytes:{num_bytes}"


def parse_policy(text: str) -> Policy:
    """Read a policy as `policy_to_text` writes it; "best:loss" is short for "best:loss:min:1".

    Raises ValueError that says how policies are written.
    """
    check_kind("text", text, str)
    try:
        match text.split(":"):
            case ["latest", n]:
                return LatestN(int(n))
            case ["every", k]:
                return EverySteps(int(k))
            case ["minutes", minutes]:
                return EveryMinutes(float(minutes))
            case ["best", metric]:
                return BestByMetric(metric)
            case ["best", metric, "min", *n] if len(n) < 2:
                return BestByMetric(metric, "min", int(*n or ["1"]))
            case ["best", metric, "max", *n] if len(n) < 2:
                return BestByMetric(metric, "max", int(*n or ["1"]))
            case ["pinned", steps]:
                return Pinned(frozenset(int(step) for step in steps.split(",") if step))
            case ["bytes", num_bytes]:
                return WithinBytes(int(num_bytes))
        raise ValueError("there is no such policy")
    except ValueError as error:
        raise ValueError(
            f"{text[:80]!r} is no retention policy ({error}): write latest:3, every:100, minutes:30, "
            "best:loss:min:2, pinned:10,20 or bytes:1000000000"
        ) from None


def parse_policies(given: object) -> tuple[Policy, ...]:
    """Return the policies that somebody gave: one or several, as values or as text.

    Raises ValueError for what is no policy.
    """
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    return tuple(_policy(one) for one in several)


def _policy(given: object) -> Policy:
    match given:
        case str():
            return parse_policy(given)
        case LatestN() | EverySteps() | EveryMinutes() | BestByMetric() | Pinned() | WithinBytes():
            return given
    raise ValueError(f'{str(given)[:80]!r} is no retention policy: give LatestN(3) or "latest:3", or several')


@dataclass(frozen=True, slots=True)
class Candidate:
    """What policies know of a checkpoint; `objects` are the bytes it takes by key, which others may share."""

    step: int
    created_utc: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    objects: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint stays, and why."""

    step: int
    is_kept: bool
    why: str


def judge(
    candidates: Iterable[Candidate], policies: Sequence[Policy], *, protected: Mapping[int, str] | None = None
) -> list[Verdict]:
    """Say of each checkpoint, oldest first, whether it stays, and by which policy it stays or goes.

    The newest one always stays, and so do those `protected` (step to reason). Raises ValueError without any
    policy: that would let all but one expire.
    """
    if not policies:
        raise ValueError("name at least one retention policy")
    ordered = sorted(candidates, key=lambda one: one.step)
    why = _reasons(ordered, policies)
    firm: dict[int, str] = {one.step: "the newest" for one in ordered[-1:]}
    firm |= {step: str(each) for each in policies if isinstance(each, Pinned) for step in each.steps}
    firm |= protected or {}
    why |= {one.step: firm[one.step] for one in ordered if one.step in firm}
    rule = f"kept are {' and '.join(map(str, policies))}"
    gone = {one.step: f"expired: {rule}" for one in ordered if one.step not in why}
    for policy in policies:
        if isinstance(policy, WithinBytes):
            staying = [one for one in ordered if one.step not in gone]
            too_much = _over_budget(staying, policy.num_bytes, firm)
            gone |= dict.fromkeys(too_much, f"expired to keep the store {policy}: {rule}")
    return [Verdict(one.step, one.step not in gone, gone.get(one.step) or why[one.step]) for one in ordered]


def _reasons(ordered: Sequence[Candidate], policies: Sequence[Policy]) -> dict[int, str]:
    """Map the steps that a policy keeps to the first policy that does."""
    keeping = [policy for policy in policies if not isinstance(policy, WithinBytes)]
    if not keeping:
        return {one.step: "it fits" for one in ordered}
    why: dict[int, str] = {}
    for policy in keeping:
        for step in _kept_by(policy, ordered):
            why.setdefault(step, str(policy))
    return why


def _kept_by(policy: Policy, ordered: Sequence[Candidate]) -> Iterable[int]:
    match policy:
        case LatestN(n):
            return [one.step for one in ordered[-n:]]
        case EverySteps(k):
            return [one.step for one in ordered if one.step % k == 0]
        case EveryMinutes(minutes):
            return _first_of_each(ordered, minutes * 60)
        case BestByMetric(metric, mode, n):
            sign = 1 if mode == "min" else -1
            ranked = sorted(
                (sign * one.metrics[metric], -one.step)
                for one in ordered
                if math.isfinite(one.metrics.get(metric, math.nan))
            )
            return [-step for _, step in ranked[:n]]
        case Pinned(steps):
            return [one.step for one in ordered if one.step in steps]
        case WithinBytes():
            return []


def _first_of_each(ordered: Sequence[Candidate], window_s: float) -> list[int]:
    """List the oldest step of each window of time, and those that do not tell when they were made."""
    first: dict[object, int] = {}
    for one in ordered:
        made_s = created_s(one.created_utc)
        first.setdefault(("unknown", one.step) if made_s is None else made_s // window_s, one.step)
    return list(first.values())


def created_s(created_utc: str) -> float | None:
    """Return the unix time that a manifest says it was created at; None if it says nothing of sense."""
    try:
        moment = datetime.fromisoformat(created_utc)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _over_budget(staying: Sequence[Candidate], num_bytes: int, firm: Collection[int]) -> list[int]:
    """List the oldest steps that have to go for the rest to fit, sparing the firm ones."""
    users: dict[str, int] = {}
    taken = 0
    for one in staying:
        for key, size in one.objects.items():
            users[key] = users.get(key, 0) + 1
            taken += size if users[key] == 1 else 0
    going = []
    for one in staying:
        if taken <= num_bytes:
            break
        if one.step in firm:
            continue
        going.append(one.step)
        for key, size in one.objects.items():
            users[key] -= 1
            taken -= 0 if users[key] else size
    return going
