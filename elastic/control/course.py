"""A run's course: its worlds, steps and failures, folded over what its journal tells. Pure arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf

from elastic.control.events import (
    Cause,
    CheckpointCaptured,
    Ending,
    Entry,
    FaultStruck,
    MemberEnded,
    MemberLost,
    SegmentEnded,
    SegmentStarted,
    Settled,
    StacksKept,
    StepCommitted,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import FormWorld, Instruction, KillMember, Manner

DRIVER_LOST = "driver lost"
WORLD_BROKEN = "world broken"


@dataclass(frozen=True, slots=True)
class FailureSpan:
    """One failure and its recovery.

    Durations in seconds, from the kill where a drill knows it, else from the first evidence.

    `detect_s` until the driver knew, `decide_s` until the next world was ordered, `form_s` until it had
    formed, `restore_s` until all its ranks held the same state, `total_s` until the next step was committed;
    `full_strength_s` until a world as large as the one before held its state. `step` is where the run stood;
    `redone_steps` of its steps the recovery gave up, to compute them again; `dropped_attempts` counts the
    uncommitted step that was begun and thrown away (0 or 1). Of several failures that one new world
    recovers from, the last carries both. None: the run ended first.

    A world that broke though no member was lost (its members formed the next one at once) is a failure too:
    cause "world broken", member "world N". So are a member killed as "hung", or as "cut off" from its peers,
    and "driver lost": a segment that begins though the one before did not end. `stacks` is the run's file on
    what a hung member did.
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
    stacks: str | None = None


@dataclass(slots=True)
class WorldCourse:
    """What became of one ordered world. `num_ends` segments had ended in good order before it."""

    order: FormWorld
    ordered_at: float
    num_ends: int
    formed: dict[str, float] = field(default_factory=dict)
    settled: dict[str, float] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    step: int | None = None
    resumed_at: float = inf
    broken_at: float = inf
    captured: dict[int, set[str]] = field(default_factory=dict)

    def take(self, at: float, entry: Entry | Instruction) -> None:
        """Take in an event of this generation."""
        match entry:
            case WorldFormed(member=member):
                self.formed[member] = at
            case Settled(member=member, step=step, source=source):
                self.settled[member] = at
                self.sources.update(source.split("+"))
                self.step = step if self.step is None else self.step
            case StepCommitted():
                self.resumed_at = min(self.resumed_at, at)
            case WorldBroken():
                self.broken_at = min(self.broken_at, at)
            case CheckpointCaptured(member=member, step=step):
                self.captured.setdefault(step, set()).add(member)

    @property
    def size(self) -> int:
        """How many ranks it was ordered with."""
        return len(self.order.members)

    def is_everyone(self, members: Iterable[str]) -> bool:
        return set(self.order.members) <= set(members)

    def all_at(self, told: dict[str, float]) -> float | None:
        """When the last of its members told something; None: not all of them did."""
        return max(told.values()) if self.is_everyone(told) else None


@dataclass(slots=True)
class Blow:
    """A failure as it was noticed, and the `world` ordered to recover from it and those before it."""

    cause: str
    member: str
    step: int
    struck_at: float
    known_at: float
    size_before: int
    has_attempt: bool
    world: WorldCourse | None = None
    is_last: bool = False


@dataclass(slots=True)
class Course:
    """The run so far, folded over its moments.

    `world` are the members of the present world that are not lost, `open_blows` the failures that no new
    world was ordered for yet. `position` is (generation, committed step); steps told late, of an older
    generation, do not move it. `attempt_in` is the generation in which a step is in progress (0: none is).
    """

    num_steps: int = 0
    num_segments: int = 0
    num_ends: int = 0
    steps: dict[int, tuple[float, StepCommitted]] = field(default_factory=dict)
    commits: set[tuple[int, int]] = field(default_factory=set)
    worlds: dict[int, WorldCourse] = field(default_factory=dict)
    blows: list[Blow] = field(default_factory=list)
    open_blows: list[Blow] = field(default_factory=list)
    world: set[str] = field(default_factory=set)
    generation: int = 0
    position: tuple[int, int] = (0, 0)
    attempt_in: int = 0
    struck: dict[str, float] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    is_driven: bool = False
    told_at: float = 0.0

    def take(self, at: float, entry: Entry | Instruction) -> None:
        """Take in the next moment."""
        match entry:
            case SegmentStarted(num_steps=num_steps):
                if self.is_driven and self.world:
                    self._fail(at, DRIVER_LOST, "driver", self.told_at)
                self.is_driven, self.num_steps = True, num_steps
                self.num_segments += 1
            case SegmentEnded():
                self.is_driven, self.world, self.open_blows, self.attempt_in = False, set(), [], 0
                self.num_ends += 1
            case FormWorld():
                self._form(at, entry)
            case Settled(generation=generation, step=step):
                self.position = max(self.position, (generation, step))
                self._begin_attempt(generation)
            case StepCommitted(generation=generation, step=step):
                self.position = max(self.position, (generation, step))
                self.steps.setdefault(step, (at, entry))
                self.commits.add((generation, step))
            case MemberEnded():
                self._end(entry)
            case FaultStruck(member=member):
                self.struck[member] = at
            case MemberLost(member=member, cause=cause) | KillMember(member=member, cause=cause):
                self._lose(at, member, cause)
            case StacksKept(member=member, file=file):
                self.stacks[member] = file
        if (world := self.worlds.get(getattr(entry, "generation", 0))) is not None:
            world.take(at, entry)
        self.told_at = at

    def span(self, blow: Blow, zero: float) -> FailureSpan:
        """Measure a failure's recovery, once everything is taken in."""
        detect_s = blow.known_at - blow.struck_at
        bare = FailureSpan(blow.cause, blow.member, blow.step, blow.struck_at - zero, detect_s)
        bare = replace(bare, stacks=self.stacks.get(blow.member))
        if blow.world is None:
            return bare
        world, first = blow.world, blow.world.order.generation
        later = [each for each in self.worlds.values() if each.order.generation >= first]
        later = [each for each in later if each.num_ends == world.num_ends]
        full = [each for each in later if each.size >= blow.size_before and each.is_everyone(each.settled)]
        formed_at, settled_at = world.all_at(world.formed), world.all_at(world.settled)
        resumed = [each.resumed_at for each in later if each.resumed_at < inf]
        until = (full or [world])[0].order.generation
        sources = {source for each in later if each.order.generation <= until for source in each.sources}
        span = replace(
            bare,
            decide_s=world.ordered_at - blow.known_at,
            form_s=_between(world.ordered_at, formed_at),
            restore_s=_between(formed_at, settled_at),
            total_s=_between(blow.struck_at, min(resumed, default=None)),
            full_strength_s=_between(blow.struck_at, full[0].all_at(full[0].settled) if full else None),
            state_source="+".join(sorted(sources)) or None,
        )
        if world.step is None or not blow.is_last:
            return span
        is_dropped = blow.has_attempt and world.step <= blow.step
        return replace(span, redone_steps=max(0, blow.step - world.step), dropped_attempts=int(is_dropped))

    def _form(self, at: float, order: FormWorld) -> None:
        is_done = self.generation in self.worlds and self.worlds[self.generation].order.leaving
        if self.world and not self.open_blows and not is_done and order.manner is Manner.AT_ONCE:
            self._fail(at, WORLD_BROKEN, f"world {self.generation}")
        world = self.worlds[order.generation] = WorldCourse(order, at, self.num_ends)
        for blow in self.open_blows:
            blow.world, blow.is_last = world, blow is self.open_blows[-1]
        self.open_blows = []
        self.generation, self.world = order.generation, set(order.members)

    def _begin_attempt(self, generation: int) -> None:
        """A world holds its state: a step is in progress, unless it makes none; one of an older world is over
        then.
        """
        if generation >= self.attempt_in:
            order = self.worlds[generation].order if generation in self.worlds else None
            makes_none = order is not None and (order.only_saves or bool(order.leaving))
            self.attempt_in = 0 if makes_none else generation

    def _end(self, ended: MemberEnded) -> None:
        if ended.generation >= self.attempt_in:
            self.attempt_in = 0
        if ended.ending is Ending.STOPPED and ended.generation == self.generation:
            self.world.discard(ended.member)  # in good order: a world after it is no recovery

    def _lose(self, at: float, member: str, cause: Cause) -> None:
        if member in self.world:
            self.world.discard(member)
            self._fail(at, cause.value, member, self.struck.get(member))

    def _fail(self, at: float, cause: str, member: str, struck_at: float | None = None) -> None:
        """Note a failure; not knowing when it struck, the first evidence in the present world counts."""
        world, step = self.worlds[self.generation], self.position[1]
        struck_at = min(at, world.broken_at) if struck_at is None else struck_at
        has_attempt = self.attempt_in > 0 and step < self.num_steps
        blow = Blow(cause, member, step, struck_at, at, world.size, has_attempt)
        self.blows.append(blow)
        self.open_blows.append(blow)


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin
