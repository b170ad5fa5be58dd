"""Simulated drivers: each carries events to its controller and does what it says, as the real one does."""

from dataclasses import dataclass, field
from functools import partial

from elastic.control.controller import Controller
from elastic.control.events import Cause, Event, GenerationTaken, Tick
from elastic.control.instructions import (
    End,
    FormWorld,
    Instruction,
    KillMember,
    Manner,
    ReleaseMember,
    StartMember,
    StopWorld,
)
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy
from tests.sim.audience import World
from tests.sim.cluster import Cluster
from tests.sim.node import Fault, Node

TICK_S = 0.25
REMIND_TICKS = 4
UNHEARD_S = 1.0  # a driver cannot know of a death that long
Story = list[tuple[float, str, Event | Instruction | str]]


@dataclass
class Driver:
    """One driver's hold on the run, from `begin` until it ends, dies, or finds that another one has it."""

    name: str
    cluster: Cluster
    policy: WorldPolicy
    most_ranks: int
    story: Story
    end: End | None = None
    is_gone: bool = False
    is_frozen: bool = False
    controller: Controller = field(init=False)
    told: list[tuple[float, Event, list[Instruction]]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    began_at: float = 0.0
    first_generation: int = 0
    claimed: int = 0
    seats: dict[str, Node] = field(default_factory=dict)
    _order: FormWorld | None = None
    _stop: StopWorld | None = None
    _num_ticks: int = 0

    def begin(self) -> None:
        """Take the run up: greet whom an earlier driver left, start what is missing."""
        cluster = self.cluster
        generation = self.first_generation = max(cluster.claims, default=0)
        prefix = f"w{generation}." if generation else "w"
        if generation:
            generation = self.first_generation = generation + 1
            cluster.claims[generation] = self.name
        self.claimed = generation
        self.controller = self.control(prefix, generation)
        self.found, self.began_at = sorted(cluster.nodes), cluster.now
        for node in cluster.nodes.values():
            self.seat(node)
            node.answered_at = cluster.now
            cluster.greet(node)
        self._act(self.controller.begin(self.found, cluster.now))
        self.tick()

    def control(self, prefix: str, generation: int) -> Controller:
        """Make the controller that this driver has as it begins."""
        copies = self.cluster.shards.copies
        return Controller(self.policy, prefix, generation, most_ranks=self.most_ranks, copies=copies)

    def seat(self, node: Node) -> None:
        """Listen to a member from now on."""
        if not self.is_gone:
            self.seats[node.name] = node

    def hear(self, node: Node, event: Event) -> bool:
        """Take what a member tells, if this driver listens to it."""
        return self.seats.get(node.name) is node and self.take(event)

    def take(self, event: Event) -> bool:
        """Carry one event to the controller; False if this driver takes none."""
        if self.is_gone or self.is_frozen or self.end is not None:
            return False
        now = self.cluster.now
        if not isinstance(event, Tick):
            self.story.append((now, f"{self.name} {self.controller.phase.value}", event))
        if getattr(event, "generation", 0) > self.controller.generation:
            self.is_gone = True  # fenced
            return False
        instructions = self.controller.handle(event, now)
        self.told.append((now, event, instructions))
        self._act(instructions)
        return True

    def tick(self) -> None:
        """Look at everybody, ten times a second or so."""
        if self.is_gone or self.end is not None:
            return
        if not self.is_frozen:
            self.take(self._look())
            self._num_ticks += 1
            if self._num_ticks % REMIND_TICKS == 0:
                self._remind()
        self.cluster.later(TICK_S, self.tick)

    def _look(self) -> Tick:
        now, silence_s, working_s, waiting = self.cluster.now, {}, {}, set()
        for node in self.cluster.nodes.values():
            if self.seats.get(node.name) is not node:
                continue  # a stranger, whom nobody asks any more
            silence_s[node.name] = now - node.answered_at
            working_s[node.name] = node.working_s(now)
            waiting.update([node.name] if now < node.full_until else [])
            if not node.is_cut_off and Fault.STOPPED not in node.faults:
                node.heard_at = now
                node.answered_at = now - self.cluster.random.uniform(0.0, 0.2)
        return Tick(silence_s, working_s, frozenset(waiting))

    def _remind(self) -> None:
        """Tell again what may have been lost on its way."""
        for member in sorted(self.controller.members.missing):
            self.cluster.greet(self.seats[member])
        if self._order is not None and self.controller.phase is Phase.FORMING:
            for member in sorted(self.controller.roll.late):
                self.cluster.order(member, self._order)
        if self._stop is not None and self.controller.phase is Phase.TRAINING:
            self._tell_stop(self._stop)

    def _act(self, instructions: list[Instruction]) -> None:
        cluster = self.cluster
        for instruction in instructions:
            if self.is_gone:
                return
            self.story.append((cluster.now, self.name, instruction))
            match instruction:
                case StartMember(member):
                    start = partial(cluster.start, member, self.seat, partial(self._awaits, member))
                    cluster.later(cluster.random.uniform(0.5, 8.0), start)
                case KillMember(member, reason, cause):
                    self._end_member(member, reason, cause)
                case ReleaseMember(member, reason):
                    self._end_member(member, reason, None)
                case FormWorld():
                    self._form(instruction)
                case StopWorld():
                    self._stop = instruction
                    self._tell_stop(instruction)
                case End() if not self._is_superseded():
                    self.end = instruction

    def _awaits(self, member: str) -> bool:
        return not self.is_gone and member in self.controller.members.starting

    def _form(self, order: FormWorld) -> None:
        """Claim the generation, then tell the members; one that somebody saving alone has is passed over."""
        cluster = self.cluster
        owner = cluster.claims.setdefault(order.generation, self.name)
        self.claimed = order.generation
        if owner.startswith("alone"):
            self.take(GenerationTaken(order.generation))
            return
        if owner != self.name:
            self.is_gone = True  # fenced
            return
        assert order.generation not in cluster.worlds, cluster.explain(f"two worlds are {order.generation}")
        num_ranks = len(set(order.members))
        assert 0 < num_ranks == len(order.members), cluster.explain("a world without ranks")
        assert num_ranks <= self.most_ranks, cluster.explain("a world with too many ranks")
        is_change = self._order is None or order.leaving or order.members != self._order.members
        assert is_change or order.manner is Manner.AT_ONCE, cluster.explain("a new world for nothing")
        cluster.worlds[order.generation] = World(order, self.name)
        self._order, self._stop = order, None
        for member in order.members:
            cluster.order(member, order)

    def _tell_stop(self, stop: StopWorld) -> None:
        for member in self.controller.members.world:
            self.cluster.stop(member, stop.generation)

    def _end_member(self, name: str, reason: str, cause: Cause | None) -> None:
        """End a process, if the run is still ours and the network lets us."""
        cluster = self.cluster
        node = cluster.nodes.get(name)
        if self._is_superseded() or self.seats.pop(name, None) is not node or node is None:
            return
        assert reason, cluster.explain(f"{name} is ended without a reason")
        if cause is Cause.HUNG:
            assert not cluster.is_sound(node), cluster.explain(f"{name} is killed, though it is sound")
        if cause is Cause.CUT_OFF:
            assert cluster.may_be_cut_off(node), cluster.explain(f"{name} is killed, though all reach it")
        self._check_kept(node)
        node.is_evicted = True
        if not node.is_cut_off:
            cluster.die(node)

    def _check_kept(self, victim: Node) -> None:
        """Nobody that is sound is ended while nobody else holds what it holds."""
        cluster, step = self.cluster, victim.standing.committed
        others = [one.standing.committed for one in cluster.nodes.values() if one is not victim]
        others += [held for at, held in cluster.fallen if cluster.now - at < UNHEARD_S]
        is_kept = step <= max(cluster.durable, *others, 0)
        is_lost = not is_kept and cluster.is_sound(victim)
        assert not is_lost, cluster.explain(f"step {step} is thrown away with {victim.name}")

    def _is_superseded(self) -> bool:
        """Whether another driver has claimed a newer world: then this one lets go, and harms nobody."""
        newer = [owner for number, owner in self.cluster.claims.items() if number > self.claimed]
        self.is_gone = self.is_gone or any(not owner.startswith("alone") for owner in newer)
        return self.is_gone

    def replay(self) -> list[list[Instruction]]:
        """Decide everything again, from what this driver was told."""
        prefix = self.controller.prefix
        controller = self.control(prefix, self.first_generation)
        controller.begin(self.found, self.began_at)
        return [controller.handle(event, at) for at, event, _ in self.told]
