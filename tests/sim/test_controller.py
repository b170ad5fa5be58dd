"""The controller under seeded chaos: simulated members die, hang, start late and are told to stop; what it
promises must hold.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from elastic.control.controller import Controller, Phase
from elastic.control.events import (
    Cause,
    Ending,
    Event,
    MemberEnded,
    MemberLeaving,
    MemberLost,
    MemberReady,
    Settled,
    StepCommitted,
    StopRequested,
    Tick,
    WorkersWanted,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import (
    End,
    FormWorld,
    Instruction,
    KillMember,
    Manner,
    ReleaseMember,
    StartMember,
    Status,
    StopWorld,
)
from elastic.control.policy import WorldPolicy
from elastic.control.standing import BLANK, Standing, settle

NUM_STEPS = 40
STEP_S = 0.4


@dataclass
class Node:
    """A simulated member: what it holds, which world it is in, and whether it still answers."""

    standing: Standing = field(default_factory=lambda: Standing(BLANK))
    generation: int = 0
    is_hung: bool = False
    hung_at: float = 0.0


@dataclass
class Simulation:
    """A cluster in simulated time. One seed decides everything that goes wrong."""

    seed: int
    stop_at_s: float | None = None
    now: float = 0.0
    nodes: dict[str, Node] = field(default_factory=dict)
    orders: dict[int, FormWorld] = field(default_factory=dict)
    arrived: dict[int, set[str]] = field(default_factory=dict)
    committed: list[tuple[int, int]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    end: End | None = None
    stopping: bool = False
    durable: int = BLANK

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.num_queued = 0
        policy = WorldPolicy(
            workers=self.random.randint(1, 6),
            min_workers=self.random.randint(1, 2),
            standbys=self.random.choice((0, 0, 1, 2)),
            forming_s=5.0,
        )
        self.controller = Controller(policy, "w")

    def run(self) -> End:
        """Play until the run ends."""
        self.act(self.controller.begin((), self.now))
        self.later(0.1, self.tick)
        for _ in range(self.random.randint(0, 4)):
            self.later(self.random.uniform(1.0, 40.0), self.strike)
        for _ in range(self.random.randint(0, 3)):
            self.later(self.random.uniform(1.0, 40.0), self.give_notice)
        for _ in range(self.random.randint(0, 2)):
            workers = self.random.randint(1, 7)
            self.later(self.random.uniform(0.0, 40.0), partial(self.tell, WorkersWanted(workers)))
        if self.stop_at_s is not None:
            self.later(self.stop_at_s, lambda: self.tell(StopRequested("test")))
        while self.end is None:
            assert self.queue, self.explain("nothing is left to happen, and the run has not ended")
            self.now, _, happen = heapq.heappop(self.queue)
            assert self.now < 4000.0, self.explain("the run makes no progress")
            happen()
        return self.end

    @property
    def newest(self) -> int:
        return self.committed[-1][1] if self.committed else 0

    def explain(self, what: str) -> str:
        """Say what went wrong, with the seed and the end of the story."""
        return "\n".join([f"seed {self.seed}: {what}", *self.story[-60:]])

    def later(self, delay_s: float, happen: Callable[[], None]) -> None:
        self.num_queued += 1
        heapq.heappush(self.queue, (self.now + delay_s, self.num_queued, happen))

    def tell(self, event: Event) -> None:
        """Deliver an event to the controller and carry out what it says."""
        if self.end is None:
            if not isinstance(event, Tick):
                self.story.append(f"{self.now:8.2f} {self.controller.phase.value}: {event}")
            self.act(self.controller.handle(event, self.now))

    def tell_later(self, event: Event) -> None:
        self.later(self.random.uniform(0.001, 0.3), lambda: self.tell(event))

    def act(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            self.story.append(f"{self.now:8.2f}   -> {instruction}")
            match instruction:
                case StartMember(member):
                    self.later(self.random.uniform(0.5, 8.0), partial(self.start, member))
                case KillMember(member) | ReleaseMember(member):
                    self.nodes.pop(member, None)
                case FormWorld(generation):
                    assert generation not in self.orders, self.explain(
                        f"generation {generation} was formed twice"
                    )
                    self.orders[generation] = instruction
                    self.arrived[generation] = set()
                    self.break_worlds(instruction)
                    for member in instruction.members:
                        self.join_soon(member, generation)
                case StopWorld():
                    self.stopping = True
                case End():
                    self.end = instruction

    def start(self, member: str) -> None:
        if self.random.random() < 0.1:
            self.tell(MemberLost(member, Cause.START_FAILED, "simulated"))
            return
        self.nodes[member] = Node()
        self.tell(MemberReady(member, f"host-{self.random.randint(0, 2)}", 1))

    def break_worlds(self, order: FormWorld) -> None:
        """An order at once takes its members out of the world they are in."""
        if order.manner is Manner.AT_ONCE:
            for member in order.members:
                if member in self.nodes and self.nodes[member].generation < order.generation:
                    self.nodes[member].generation = 0

    def join_soon(self, member: str, generation: int) -> None:
        self.later(self.random.uniform(0.01, 0.3), lambda: self.join(member, generation))

    def join(self, member: str, generation: int) -> None:
        """A member arrives at the rendezvous once it has left its world; the last one to arrive lets all
        settle.
        """
        node = self.nodes.get(member)
        if node is None or node.is_hung or generation < max(self.orders):
            return
        if node.generation:
            return  # still in an older world: it comes at the step boundary
        self.arrived[generation].add(member)
        if self.arrived[generation] == set(self.orders[generation].members):
            self.form(generation)

    def form(self, generation: int) -> None:
        members = self.orders[generation].members
        if any(member not in self.nodes for member in members):
            return  # one died at the rendezvous: the others cannot connect, and the next order frees them
        standings = [self.nodes[member].standing for member in members]
        settlement = settle(standings)
        step = max(settlement.step, 0)
        assert step >= self.newest or not any(
            node.standing.committed >= self.newest for node in self.nodes.values()
        ), self.explain(f"step {self.newest} is redone though somebody holds it")
        if settlement.step == BLANK:  # nobody who held the state is left
            step = max(self.durable, 0)
            self.committed.append((generation, step))
        elif step != self.newest:  # everybody applied what all held, or nobody is left who held the newest
            self.committed.append((generation, step))
        for member in members:
            self.nodes[member].generation = generation
            self.nodes[member].standing = Standing(step)
            self.tell_later(WorldFormed(member, generation, 0.1))
            self.tell_later(Settled(member, generation, step, "peer", 0.1))
        self.later(STEP_S, lambda: self.step(generation))

    def step(self, generation: int) -> None:
        """One step of a world: reduce, agree, apply; a blow may fall between any of them."""
        members = self.orders[generation].members
        if any(member not in self.nodes or self.nodes[member].generation != generation for member in members):
            return
        if any(self.nodes[member].is_hung for member in members):
            return
        step = self.nodes[members[0]].standing.committed
        if step >= NUM_STEPS or self.stopping:
            self.durable = step
            ending = Ending.FINISHED if step >= NUM_STEPS else Ending.STOPPED
            for member in members:
                self.tell_later(MemberEnded(member, generation, step, ending))
                self.leave(member)
            return
        reduced = [member for member in members if self.random.random() > 0.02]
        for member in reduced:
            self.nodes[member].standing = Standing(step, reduced=step)
        if len(reduced) < len(members):
            self.die(self.random.choice(members))
            return
        applied = list(members)
        if self.random.random() < 0.02:
            applied = applied[: self.random.randint(1, len(applied))]
        for member in applied:
            self.nodes[member].standing = Standing(step + 1)
        self.committed.append((generation, step + 1))
        if len(applied) < len(members):
            self.die(self.random.choice(members))
            return
        for member in members:
            self.tell_later(StepCommitted(member, generation, step + 1, 1.0, STEP_S, 1, 0.0))
        if max(self.orders) > generation:
            for member in members:
                self.tell_later(MemberEnded(member, generation, step + 1, Ending.REGROUP))
                self.leave(member)
            return
        self.later(STEP_S * self.random.uniform(0.8, 1.3), lambda: self.step(generation))

    def leave(self, member: str) -> None:
        """A member is out of its world: it takes up the newest order that it has not followed yet."""
        left, self.nodes[member].generation = self.nodes[member].generation, 0
        newest = max(self.orders)
        if newest > left and member in self.orders[newest].members:
            self.join_soon(member, newest)

    def die(self, member: str) -> None:
        """A SIGKILL: its peers see their collective fail, the driver hears of the loss, in either order."""
        generation = self.nodes.pop(member).generation
        self.tell_later(MemberLost(member, Cause.PROCESS_DIED, "simulated"))
        for other, node in self.nodes.items():
            if generation and node.generation == generation:
                self.tell_later(WorldBroken(other, generation, "simulated"))
                self.leave(other)

    def strike(self) -> None:
        if not self.nodes:
            return
        member = self.random.choice(sorted(self.nodes))
        if self.random.random() < 0.3:
            self.nodes[member].is_hung, self.nodes[member].hung_at = True, self.now
        else:
            self.die(member)

    def give_notice(self) -> None:
        """A machine will be taken away, and some time later is, whether its member has left or not."""
        if self.nodes:
            member = self.random.choice(sorted(self.nodes))
            self.tell(MemberLeaving(member, "simulated"))
            self.later(self.random.uniform(0.5, 60.0), partial(self.take_away, member))

    def take_away(self, member: str) -> None:
        if member in self.nodes:
            self.die(member)

    def tick(self) -> None:
        self.tell(
            Tick(
                {
                    member: self.now - node.hung_at if node.is_hung else self.random.uniform(0.0, 0.4)
                    for member, node in self.nodes.items()
                }
            )
        )
        self.later(0.1, self.tick)


@pytest.mark.parametrize("block", range(10))
def test_every_run_ends_and_no_committed_step_is_lost(block: int) -> None:
    live_through(range(block * 50, block * 50 + 50))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(1, 41))
def test_every_one_of_20000_runs_ends_and_no_committed_step_is_lost(block: int) -> None:
    live_through(range(block * 500, block * 500 + 500))


def live_through(seeds: range) -> None:
    """Play each seed's run, and hold it to the promises."""
    for seed in seeds:
        simulation = Simulation(seed)
        end = simulation.run()
        assert end.status is Status.FINISHED, simulation.explain(f"the run ended as {end}")
        newest = 0
        for _, step in simulation.committed:
            assert step <= newest + 1, simulation.explain(f"step {step} was committed after step {newest}")
            newest = step
        assert newest == NUM_STEPS


@pytest.mark.parametrize("seed", range(100))
def test_a_stop_ends_the_run_with_a_durable_checkpoint_of_its_last_step(seed: int) -> None:
    simulation = Simulation(seed, stop_at_s=random.Random(seed).uniform(0.0, 20.0))
    end = simulation.run()
    assert end.status in (Status.STOPPED, Status.FINISHED), simulation.explain(f"the run ended as {end}")
    if simulation.committed and "no worker is left" not in end.reason:
        assert simulation.durable == simulation.committed[-1][1], simulation.explain(
            "the last step is not durable"
        )


def test_what_an_older_generation_says_is_ignored() -> None:
    controller = Controller(WorldPolicy(workers=2), "w")
    controller.begin((), 0.0)
    controller.handle(MemberReady("w0", "a", 1), 1.0)
    formed = controller.handle(MemberReady("w1", "b", 2), 1.0)
    assert isinstance(formed[0], FormWorld)
    for member in ("w0", "w1"):
        controller.handle(Settled(member, 1, 0, "fresh", 0.1), 2.0)
    assert controller.phase is Phase.TRAINING
    assert controller.handle(WorldBroken("w0", 0, "late"), 3.0) == []
    assert controller.handle(Tick(), 9.0) == []
    assert controller.phase is Phase.TRAINING
