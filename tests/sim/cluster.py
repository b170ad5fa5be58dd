"""A simulated cluster: members that obey orders, worlds, a store with claims; one generator decides it."""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from elastic.control.events import (
    Cause,
    Ending,
    Event,
    MemberBuilding,
    MemberCame,
    MemberEnded,
    MemberLeaving,
    MemberLost,
    MemberReady,
    Settled,
    StepCommitted,
    UserFailed,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import FormWorld, Manner
from elastic.control.standing import BLANK, Standing, settle
from tests.sim.audience import Audience, World
from tests.sim.network import Network
from tests.sim.node import Fault, Node
from tests.sim.reading import SlowData
from tests.sim.shards import Shards

NUM_STEPS = 40
STEP_S = 0.4
SAVE_EVERY = 10
CONNECT_S = 5.0  # until a member that cannot reach another one gives the new world up
BLOCKED_S = 0.25  # how often something that waits for a hang or a partition to end looks again


@dataclass
class Cluster:
    """Members, worlds, store and time."""

    random: random.Random
    explain: Callable[[str], str]
    now: float = 0.0
    nodes: dict[str, Node] = field(default_factory=dict)
    worlds: dict[int, World] = field(default_factory=dict)
    claims: dict[int, str] = field(default_factory=dict)
    committed: list[tuple[int, int]] = field(default_factory=list)
    settled: int = 0  # the newest generation that came to hold its state
    durable: int = BLANK
    fallen: list[tuple[float, int]] = field(default_factory=list)
    audience: Audience | None = None
    is_chaotic: bool = True
    restore_s: float = 3.0
    network: Network = field(default_factory=Network)
    num_places: int = 1 << 30  # where a process can be
    deadly_step: int = -1  # whoever computes it loses one of the world
    slow_data: SlowData = field(default_factory=SlowData)
    shards: Shards = field(default_factory=Shards)
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _num_queued: int = 0

    def later(self, delay_s: float, happen: Callable[[], None]) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._num_queued, happen))

    def next(self) -> None:
        """Let the next thing happen."""
        assert self._queue, self.explain("nothing is left to happen, and the run has not ended")
        self.now, _, happen = heapq.heappop(self._queue)
        happen()

    @property
    def newest(self) -> int:
        return self.committed[-1][1] if self.committed else 0

    # ------------------------------------------------------------------------------- what members tell

    def tell(self, node: Node, event: Event) -> None:
        """Send an event: late, perhaps twice, and past others."""
        self.later(self.random.uniform(0.001, 0.3), partial(self._deliver, node, event))
        if self.random.random() < 0.05:
            self.later(self.random.uniform(0.1, 2.0), partial(self._deliver, node, event))

    def _deliver(self, node: Node, event: Event) -> None:
        if node.is_cut_off and not isinstance(event, MemberLost) and self.random.random() < 0.2:
            return  # the call that carried it failed
        is_heard = not node.is_cut_off and self.audience is not None and self.audience.hear(node, event)
        if not is_heard and (not self.is_gone(node) or isinstance(event, MemberLost)):
            self.later(2 * BLOCKED_S, partial(self._deliver, node, event))

    # --------------------------------------------------------------------------------- what members are told

    @property
    def has_few_places(self) -> bool:  # a process may have to wait until another one ends
        return self.num_places < 1000

    def start(self, name: str, seat: Callable[[Node], None], is_awaited: Callable[[], bool]) -> None:
        """A process comes up, or fails to; where there is no place for it, it waits for one."""
        if name in self.nodes or (self.has_few_places and not is_awaited()):
            return  # where there are many places it may come up all the same, a stranger
        if sum(not node.is_beyond_help(self.now) for node in self.nodes.values()) >= self.num_places:
            self.later(BLOCKED_S, partial(self.start, name, seat, is_awaited))
            return
        node = Node(name, f"host-{self.random.randint(0, 2)}", heard_at=self.now, answered_at=self.now)
        seat(node)
        if self.is_chaotic and self.random.random() < 0.1:
            self.tell(node, MemberLost(name, Cause.START_FAILED, "simulated"))
            return
        self.nodes[name] = node
        if self.is_chaotic and self.random.random() < 0.02:
            self.refuse(node)
        builds_s = self.random.choice((0.0,) * 9 + (15.0,)) if self.is_chaotic else 0.0
        node.ready_at = self.now + builds_s
        self.later(builds_s, partial(self.greet, node))

    def greet(self, node: Node) -> None:
        if node.is_cut_off or Fault.STOPPED in node.faults or self.is_gone(node):
            return
        if self.now < node.ready_at or (node.has_raised and node.is_blank):
            self.tell(node, MemberBuilding(node.name))
        else:
            self.tell(node, MemberReady(node.name, node.host, 1, node.standing.committed, node.newest))
        if node.has_raised:
            self.refuse(node)
        if node.has_notice:
            self.give_notice(node)

    def give_notice(self, node: Node) -> None:
        """A member learns that it will be taken away, and says so to its driver and to each new one."""
        node.has_notice = True
        self.tell(node, MemberLeaving(node.name, "simulated"))

    def refuse(self, node: Node) -> None:
        """A member's job raises: it leaves its world, and serves no other one but to save what it holds."""
        node.has_raised = True
        self.tell(node, UserFailed(node.name, 0, max(node.standing.committed, 0), "the job raised", ""))
        if node.inside:
            self._leave(node, node.inside)

    def order(self, name: str, order: FormWorld) -> None:
        """An order reaches a member some time; one that comes too late is ignored, as in its mailbox."""
        self.later(self.random.uniform(0.001, 0.2), partial(self._take_order, name, order))

    def _take_order(self, name: str, order: FormWorld) -> None:
        node = self.nodes.get(name)
        if node is None or node.is_cut_off or Fault.STOPPED in node.faults:
            return  # lost; the driver reminds
        if order.generation <= node.newest:
            if order.generation == node.taken:
                self.tell(node, MemberCame(name, order.generation))
            return
        node.order = order
        if order.manner is Manner.AT_ONCE and 0 < node.inside < order.generation:
            self.later(max(0.0, node.busy_until - self.now), partial(self._leave, node, node.inside))
        self.advance(node)

    def stop(self, name: str, generation: int) -> None:
        node = self.nodes.get(name)
        if node is not None and not node.is_cut_off:
            node.stop_generation = max(node.stop_generation, generation)

    def advance(self, node: Node) -> None:
        """Let a training thread that waits for orders, or for the others at a rendezvous, go on."""
        if self.is_gone(node) or node.faults or node.inside or node.order is None:
            return
        if node.has_raised and not node.order.only_saves:
            return
        if node.waiting_at:
            self.tell_broken(node, node.waiting_at, "a newer world was ordered")
        node.taken = node.waiting_at = node.order.generation
        node.order = None
        self.tell(node, MemberCame(node.name, node.taken))
        self._meet(node.taken)

    def _meet(self, generation: int) -> None:  # the last one to arrive at a rendezvous lets all connect
        members = self._members(generation)
        if members is None or any(node.waiting_at != generation for node in members):
            return
        if self.network.is_torn(members):
            self.later(CONNECT_S, partial(self._fail_to_connect, generation))
        else:
            self.later(self.random.uniform(0.01, 0.1), partial(self._connect, generation))

    def _fail_to_connect(self, generation: int) -> None:
        peers = {name: self.nodes.get(name) for name in self.worlds[generation].order.members}
        for node in peers.values():
            if node is not None and node.waiting_at == generation:
                node.waiting_at = 0
                unreachable = self.network.unreachable(node, peers)
                self.tell_broken(node, generation, "could not form: timed out", unreachable)
                self.advance(node)

    def _connect(self, generation: int) -> None:
        members = self._members(generation)
        if members is None or any(node.waiting_at != generation for node in members):
            self._fail_to_connect(generation)
            return
        for node in members:
            node.inside, node.waiting_at = generation, 0
            self.tell(node, WorldFormed(node.name, generation, 0.1))
        is_restored = all(node.is_blank for node in members)
        lasts_s = self.random.uniform(0.01, self.restore_s if is_restored else 0.5)
        members[0].restores_until = self.now + lasts_s if is_restored else 0.0
        self.later(lasts_s, partial(self._settle, generation))

    def _settle(self, generation: int) -> None:
        members = self._together(generation, self._settle)
        if members is None:
            return
        settlement = settle([node.standing for node in members])
        step, source = max(settlement.step, 0), "peer"
        if settlement.step == BLANK:
            step, source = max(self.durable, 0), "store"
        for gained in range(self.newest + 1, step + 1):  # by applying what all held, or by others, who saved
            self._commit(generation, gained)
        self.settled = max(self.settled, generation)
        order, is_newest = self.worlds[generation].order, generation == self.settled
        if is_newest and step < self.newest:
            self._roll_back(generation, step)
        for node in members:
            told = "self" if source == "peer" and not node.is_blank else source
            node.standing = Standing(step)
            self.tell(node, Settled(node.name, generation, step, told, 0.1))
        if is_newest:
            self.shards.settle(members, order.leaving, self.is_sound)
        if order.leaving:
            self._end(members, Ending.REGROUP)
        elif order.only_saves:
            self._save_last(generation, Ending.FINISHED if step >= NUM_STEPS else Ending.STOPPED)
        else:
            self._begin_step(generation)

    def _commit(self, generation: int, step: int) -> None:
        """Note a step, unless it is one of a world that others went on without: it changes nothing."""
        if generation >= self.settled:
            self.committed.append((generation, step))

    def _roll_back(self, generation: int, step: int) -> None:
        """Committed steps are given up: nobody in good order may have held them."""
        held = [one for one in self.nodes.values() if one.standing.committed > step and self.is_sound(one)]
        what = f"step {self.newest} is redone from {step} on, though {[one.name for one in held]} hold it"
        assert not held, self.explain(what)
        self.committed.append((generation, step))

    def _begin_step(self, generation: int) -> None:
        members = self._members(generation) or []
        for node in members:
            node.began_at = self.now
            node.busy_until = self.now + STEP_S * node.slowness * self.random.uniform(0.8, 1.2)
        self.slow_data.hold_up(members, self.now)
        lasts_s = max((node.busy_until for node in members), default=self.now) - self.now
        is_deadly = any(node.standing.committed == self.deadly_step for node in members)
        self.later(lasts_s, partial(self._strike if is_deadly else self._step, generation))

    def _strike(self, generation: int) -> None:  # a step kills one of those who compute it
        members = self._together(generation, self._strike)
        if members is not None:
            self.die(self.random.choice(members))

    def _step(self, generation: int) -> None:
        """The end of a step: reduce, agree, apply; a blow may fall between any of them."""
        members = self._together(generation, self._step)
        if members is None:
            return
        step = members[0].standing.committed
        is_stopping = any(
            each.stop_generation >= generation or each.is_orphaned(self.now) for each in members
        )
        if step >= NUM_STEPS:
            self._save_last(generation, Ending.FINISHED)
            return
        reduced = [node for node in members if not self.is_chaotic or self.random.random() > 0.01]
        for node in reduced:
            node.standing = Standing(step, reduced=step)
        if len(reduced) < len(members):
            self.die(self.random.choice(members))
            return
        applied = list(members)
        if self.is_chaotic and self.random.random() < 0.01:
            applied = applied[: self.random.randint(1, len(applied))]
        for node in applied:
            node.standing = Standing(step + 1)
        self._commit(generation, step + 1)
        if len(applied) < len(members):
            self.die(self.random.choice(members))
            return
        if (step + 1) % SAVE_EVERY == 0:
            self.durable = max(self.durable, step + 1)
        for node in members:
            told = StepCommitted(node.name, generation, step + 1, 1.0, STEP_S, 1, 0.0, is_stopping)
            self.tell(node, told)
        if is_stopping:
            self._save_last(generation, Ending.STOPPED)
        elif any(node.order is not None and node.order.generation > generation for node in members):
            self._end(members, Ending.REGROUP)
        else:
            self._begin_step(generation)

    def _save_last(self, generation: int, ending: Ending) -> None:
        self.later(self.random.uniform(0.05, 1.0), partial(self._end_saved, ending, generation))

    def _end_saved(self, ending: Ending, generation: int) -> None:
        members = self._together(generation, partial(self._end_saved, ending))
        if members is not None:
            self.durable = max(self.durable, members[0].standing.committed)
            self._end(members, ending)

    def _end(self, members: Iterable[Node], ending: Ending) -> None:
        for node in members:
            self.tell(node, MemberEnded(node.name, node.inside, node.standing.committed, ending))
            node.inside = 0
            if ending is not Ending.REGROUP and node.is_orphaned(self.now):
                self.expire(node)
            self.advance(node)

    def _leave(self, node: Node, generation: int) -> None:
        """Drop a world's group, which breaks it for all; a thread that is held up does so when it goes on."""
        if self.is_gone(node) or node.inside != generation:
            return
        if node.faults or node.is_held_up(self.now):
            self.later(BLOCKED_S, partial(self._leave, node, generation))
            return
        node.inside = 0
        self.tell_broken(node, generation, "simulated")
        if not node.is_isolated:
            self._break(generation)
        self.advance(node)

    def give_up(self, generation: int) -> None:
        """All who hold a state give it up, as it is disputed or lost, and leave their world."""
        members = self._members(generation) or []
        is_apart = any(node.inside not in (0, generation) for node in self.nodes.values())
        if is_apart or not all(self._is_at_work(node, generation) for node in members):
            return
        for node in self.nodes.values():
            node.standing = Standing(BLANK)
        for node in members:
            self._leave(node, generation)

    def _is_at_work(self, node: Node, generation: int) -> bool:
        is_well = not (node.faults or node.is_isolated or node.is_held_up(self.now))
        return is_well and node.inside == generation and not node.is_blank

    def tell_broken(
        self, node: Node, generation: int, why: str, unreachable: tuple[str, ...] | None = None
    ) -> None:
        self.tell(node, WorldBroken(node.name, generation, why, node.is_blank, unreachable))

    def _break(self, generation: int) -> None:
        for other in list(self.nodes.values()):
            if other.inside == generation and not other.is_isolated:
                hears_s = max(self.random.uniform(0.001, 0.1), other.busy_until - self.now)
                self.later(hears_s, partial(self._leave, other, generation))

    def die(self, node: Node) -> None:
        """A SIGKILL: its peers see their collective fail, the driver hears of the loss, in either order."""
        if self.is_gone(node):
            return
        del self.nodes[node.name]
        self.fallen.append((self.now, node.standing.committed))
        self.tell(node, MemberLost(node.name, Cause.PROCESS_DIED, "simulated"))
        if node.inside:
            self._break(node.inside)

    def expire(self, node: Node) -> None:
        """A member without a driver saves what nobody else did, and ends."""
        if node.standing.committed > max(self.durable, 0):
            self.claims.setdefault(max(self.claims, default=0) + 1, f"alone-{node.name}")
            self.durable = node.standing.committed
        self.die(node)

    def is_gone(self, node: Node) -> bool:
        return self.nodes.get(node.name) is not node

    def is_sound(self, node: Node) -> bool:
        return not (self.is_gone(node) or self.network.touches(node)) and node.is_sound(self.now)

    def may_be_cut_off(self, node: Node) -> bool:
        """Whether a member is out of reach of others, or was lately; of two nobody can tell which it is."""
        living = [self.nodes.get(name) for name in self.worlds[node.taken].order.members]
        suspects = living if len(living) == 2 else [node]
        return any(one is None or not self.is_sound(one) for one in suspects)

    def _members(self, generation: int) -> list[Node] | None:  # None if one of them is gone
        found = [self.nodes.get(name) for name in self.worlds[generation].order.members]
        living = [node for node in found if node is not None]
        return living if len(living) == len(found) else None

    def _together(self, generation: int, again: Callable[[int], None]) -> list[Node] | None:
        """Return a world's members if all can go on; look again later while some hang or are cut off."""
        members = self._members(generation)
        if members is None or any(node.inside != generation for node in members):
            return None  # it broke
        if self.network.is_torn(members) or any(node.faults or node.is_held_up(self.now) for node in members):
            self.later(BLOCKED_S, partial(again, generation))
            return None
        return members
