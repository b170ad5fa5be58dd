"""Very many members in simulated time, under failures like those of Llama 3's training."""

import heapq
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from elastic.control.controller import Controller
from elastic.control.events import (
    Cause,
    Event,
    MemberCame,
    MemberLost,
    MemberReady,
    Settled,
    StepCommitted,
    Tick,
    WorldFormed,
)
from elastic.control.instructions import FormWorld, Instruction, StartMember
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy

STEP_S = 6.0
TICKS_A_STEP = 60
# arXiv 2407.21783, table 5: 419 unexpected interruptions in 54 days on 16,384 GPUs.
FAILURES_PER_MEMBER_S = 419 / 54 / 16_384 / 86_400
RESTART_S = (60.0, 300.0)

Handle = Callable[[Event, float], list[Instruction]]


@dataclass
class Fleet:
    """A cluster of equal members; `gauge`, if there is one, stands between it and its controller.

    Of each step `num_telling` members tell, and the controller looks `num_ticks` times meanwhile.
    """

    num_members: int
    seed: int = 3
    num_telling: int = 20
    num_ticks: int = 1
    gauge: Callable[[Handle], Handle] | None = None
    now: float = 0.0
    num_events: int = 0
    worlds: list[FormWorld] = field(default_factory=list)
    committed: Counter[int] = field(default_factory=Counter)
    starting: list[tuple[float, str]] = field(default_factory=list)
    living: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        policy = WorldPolicy(self.num_members, max_failures=10**6, gather_s=600.0)
        self.controller = Controller(policy, "w")
        self._handle = self.gauge(self.controller.handle) if self.gauge else self.controller.handle
        self.act(self.controller.begin((), 0.0))

    def tell(self, event: Event) -> None:
        self.num_events += 1
        self.act(self._handle(event, self.now))

    def act(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case StartMember(member):
                    heapq.heappush(self.starting, (self.now + self.random.uniform(*RESTART_S), member))
                case FormWorld():
                    self.worlds.append(instruction)

    def failures(self) -> Iterator[float]:
        """Yield the moments at which some member dies."""
        at = 0.0
        while True:
            at += self.random.expovariate(self.num_members * FAILURES_PER_MEMBER_S)
            yield at

    def run(self, steps: int, step_s: float) -> None:
        """Play for so many steps: starts, deaths, and what members tell."""
        failures = self.failures()
        next_failure = next(failures)
        for _ in range(steps):
            while next_failure <= self.now:
                self.die()
                next_failure = next(failures)
            self.step(step_s)

    def die(self) -> None:
        if self.living:
            victim = self.random.choice(list(self.living))
            del self.living[victim]
            self.tell(MemberLost(victim, Cause.PROCESS_DIED, "simulated"))

    def step(self, step_s: float) -> None:
        """The newest world settles if it has not, and commits a step."""
        for _ in range(self.num_ticks):
            self.now += step_s / self.num_ticks
            self.tell(Tick(dict.fromkeys(self.living, 0.1), dict.fromkeys(self.living, 0.5)))
        while self.starting and self.starting[0][0] <= self.now:
            _, member = heapq.heappop(self.starting)
            self.living[member] = None
            self.tell(MemberReady(member, f"host{len(self.living) // 8}", 1))
        if self.controller.phase is Phase.FORMING:
            self.settle(self.worlds[-1])
        if self.controller.phase is Phase.TRAINING:
            world = self.worlds[-1]
            step = max(self.committed, default=0) + 1
            self.committed[step] += 1
            for member in world.members[: self.num_telling]:
                self.tell(StepCommitted(member, world.generation, step, 1.0, step_s, 1, 0.0))

    def settle(self, world: FormWorld) -> None:
        for member in world.members:
            self.tell(MemberCame(member, world.generation))
        for member in world.members:
            self.tell(WorldFormed(member, world.generation, 0.1))
        for member in world.members:
            self.tell(Settled(member, world.generation, max(self.committed, default=0), "peer", 0.1))


def trained(num_members: int, gauge: Callable[[Handle], Handle] | None = None) -> Fleet:
    """A fleet that starts, makes a step that everybody tells, loses a member, and makes another."""
    fleet = Fleet(num_members, num_telling=num_members, num_ticks=TICKS_A_STEP, gauge=gauge)
    while not fleet.committed:
        fleet.now += RESTART_S[1]
        fleet.step(STEP_S)
    fleet.die()
    fleet.step(STEP_S)
    return fleet


@dataclass
class Stopwatch:
    """Measures the seconds of a core that events cost."""

    seconds: float = 0.0

    def __call__(self, handle: Handle) -> Handle:
        def timed(event: Event, now: float) -> list[Instruction]:
            started = time.perf_counter()
            instructions = handle(event, now)
            self.seconds += time.perf_counter() - started
            return instructions

        return timed


@dataclass
class Odometer:
    """Counts the bytecode instructions that deciding takes, by the kind of event: the same on any machine."""

    counts: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    _num: int = 0

    def __call__(self, handle: Handle) -> Handle:
        def counted(event: Event, now: float) -> list[Instruction]:
            self._num, before = 0, sys.gettrace()
            sys.settrace(self._enter)
            try:
                return handle(event, now)
            finally:
                sys.settrace(before)
                self.counts[type(event).__name__] += self._num
                self.events[type(event).__name__] += 1

        return counted

    def _enter(self, frame: FrameType, _what: str, _argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, _frame: FrameType, what: str, _argument: Any) -> Any:
        self._num += what == "opcode"
        return self._step

    @property
    def mean(self) -> float:
        """Instructions per event, over all kinds."""
        return sum(self.counts.values()) / sum(self.events.values())

    def per_event(self, kind: type[Event]) -> float:
        """Instructions per event of this kind."""
        return self.counts[kind.__name__] / self.events[kind.__name__]
