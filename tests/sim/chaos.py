"""A run under chaos: one seed decides everything that goes wrong, and when."""

import random
from collections.abc import Callable
from functools import partial

from elastic.control.events import Event, StopRequested, WorkersWanted
from elastic.control.instructions import End
from elastic.control.policy import WorldPolicy
from tests.sim.cluster import NUM_STEPS, Cluster
from tests.sim.driving import Driver, Story
from tests.sim.node import Fault, Node
from tests.sim.reading import SlowData

CHAOS_S = 40.0  # blows fall within that time
LIMIT_S = 4000.0
STORY_LINES = 80


class Chaos:
    """A cluster and its drivers in simulated time."""

    def __init__(self, seed: int, stop_at_s: float | None = None) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.story: Story = []
        self.cluster = Cluster(self.random, self.explain, audience=self)
        workers = self.random.randint(1, 6)
        self.is_deadly = self.random.random() < 0.05
        if self.is_deadly:
            self.cluster.deadly_step = self.random.randint(1, NUM_STEPS - 1)
        if self.random.random() < 0.2:
            step, is_for_all = self.random.randrange(NUM_STEPS), self.random.random() < 0.5
            self.cluster.slow_data = SlowData(step, 30.0, is_for_all)
        self.policy = WorldPolicy(
            workers=workers,
            min_workers=min(workers, self.random.choice((1, 2, 6))),
            standbys=self.random.choice((0, 0, 1, 2)),
            max_failures=6 if self.is_deadly else self.random.choice((1000,) * 9 + (3,)),
            forming_s=5.0,
            start_s=30.0,
        )
        if self.random.random() < 0.3:  # a replacement needs the place of whom it replaces
            self.cluster.num_places = workers + self.policy.standbys
        self.cluster.shards.copies = self.random.choice((0, 1, 2))
        self.most_ranks = self.random.choice((1 << 30, workers))
        self.cluster.restore_s = self.random.choice((3.0, 200.0))
        self.drivers: list[Driver] = []
        self.wanted = self.policy.workers
        self.stop_reason: str | None = None
        self.stop_at_s = stop_at_s

    def run(self) -> End:
        """Play until the run ends."""
        self.take_up()
        for blow, most in self.blows():
            for _ in range(self.random.randint(0, most)):
                self.cluster.later(self.random.uniform(0.5, CHAOS_S), blow)
        self.cluster.later(CHAOS_S, self.calm)
        self.cluster.later(1.0, self.lease)
        if self.stop_at_s is not None:
            self.cluster.later(self.stop_at_s, self.stop)
        while (end := self.end) is None:
            self.cluster.next()
            assert self.cluster.now < LIMIT_S, self.explain("the run makes no progress")
        return end

    def blows(self) -> list[tuple[Callable[[], None], int]]:
        """List what goes wrong, and how often at most."""
        return [
            (self.kill, 4),
            (partial(self.afflict, Fault.STOPPED), 1),
            (partial(self.afflict, Fault.STUCK), 1),
            (self.cut_off, 1),
            (self.isolate, 1),
            (self.part, 1),
            (self.cut_off_all, 1 if self.random.random() < 0.2 else 0),
            (self.slow_down, 2),
            (self.fill, 1),
            (self.lose_state, 2 if self.random.random() < 0.3 else 0),
            (self.raise_error, 1 if self.random.random() < 0.1 else 0),
            (self.give_notice, 3),
            (self.give_everybody_notice, 1 if self.random.random() < 0.2 else 0),
            (self.resize, 2),
            (self.lose_driver, 1),
            (self.freeze_driver, 1),
        ]

    @property
    def end(self) -> End | None:
        """How the run ended, if it did."""
        return next((driver.end for driver in self.drivers if driver.end is not None), None)

    def explain(self, what: str) -> str:
        """Say what went wrong, how to see it again, and the end of the story."""
        again = f'python -c "from tests.sim.chaos import show; show({self.seed}, {self.stop_at_s})"'
        lines = [f"{at:9.2f} {who:22} {what}" for at, who, what in self.story[-STORY_LINES:]]
        return "\n".join([f"seed {self.seed}: {what}", f"again: {again}", *lines])

    def hear(self, node: Node, event: Event) -> bool:
        """Carry what a member tells to a driver that is there."""
        return any(driver.hear(node, event) for driver in reversed(self.drivers))

    def ask(self, event: Event) -> None:
        """Tell the driver what somebody asks for."""
        any(driver.take(event) for driver in reversed(self.drivers))

    # ------------------------------------------------------------------------------------------------ drivers

    def take_up(self) -> None:
        """Start a driver, the first one or a successor."""
        if self.end is None:
            name = f"driver-{len(self.drivers)}"
            driver = Driver(name, self.cluster, self.policy, self.most_ranks, self.story)
            self.drivers.append(driver)
            driver.begin()
            if self.wanted != self.policy.workers:
                driver.take(WorkersWanted(self.wanted))
            if self.stop_reason is not None:
                driver.take(StopRequested(self.stop_reason))

    def lose_driver(self) -> None:
        """SIGKILL the driver; its successor comes soon, or after the workers' lease."""
        self.note("the driver dies")
        self.drivers[-1].is_gone = True
        delay_s = (
            self.random.uniform(1.0, 20.0) if self.random.random() < 0.8 else self.random.uniform(55.0, 90.0)
        )
        self.cluster.later(delay_s, self.take_up)

    def freeze_driver(self) -> None:
        """SIGSTOP the driver, and let it go on later; meanwhile it may have got a successor."""
        driver, lasts_s = self.drivers[-1], self.random.uniform(1.0, 40.0)
        self.note(f"the driver sleeps for {lasts_s:.1f} s")
        driver.is_frozen = True
        self.cluster.later(lasts_s, partial(self.thaw_driver, driver))
        if self.random.random() < 0.5 and not self.cluster.has_few_places:  # two would fight over them
            self.cluster.later(self.random.uniform(0.0, lasts_s), self.take_up)

    def thaw_driver(self, driver: Driver) -> None:
        self.note("the driver wakes")
        driver.is_frozen = False

    def resize(self) -> None:
        self.wanted = self.random.randint(1, 7)
        self.ask(WorkersWanted(self.wanted))

    def stop(self) -> None:
        self.stop_reason = "test"
        self.ask(StopRequested("test"))

    # ------------------------------------------------------------------------------------------------ members

    def victim(self) -> Node | None:
        names = sorted(self.cluster.nodes)
        return self.cluster.nodes[self.random.choice(names)] if names else None

    def kill(self) -> None:
        if node := self.victim():
            self.note(f"{node.name} is killed")
            self.cluster.die(node)

    def afflict(self, fault: Fault) -> None:
        """A member hangs, for ever or for a while, as a process or in its training thread only."""
        if node := self.victim():
            lasts_s = self.random.choice((self.random.uniform(0.5, 5.0), 1e9))
            self.note(f"{node.name} is {fault.name.lower()} for {lasts_s:.1f} s")
            node.faults.append(fault)
            node.is_stuck_working = node.inside > 0 and self.cluster.now < node.busy_until
            self.cluster.later(lasts_s, partial(self.recover, node, fault))

    def recover(self, node: Node, fault: Fault) -> None:
        node.faults.remove(fault)
        node.blemished_at = self.cluster.now
        node.is_stuck_working = bool(node.faults) and node.is_stuck_working
        self.cluster.advance(node)

    def cut_off(self) -> None:
        """A member and the drivers cannot reach each other for a while."""
        if node := self.victim():
            lasts_s = self.random.choice((self.random.uniform(0.5, 10.0), self.random.uniform(20.0, 120.0)))
            self.note(f"{node.name} is cut off from the driver for {lasts_s:.1f} s")
            node.is_cut_off = True
            self.cluster.later(lasts_s, partial(self.reach, node))

    def cut_off_all(self) -> None:
        """The drivers' own network fails for a while, mostly for less than the workers' lease."""
        lasts_s = self.random.choice((self.random.uniform(1.0, 50.0), self.random.uniform(60.0, 100.0)))
        self.note(f"the driver is cut off from all for {lasts_s:.1f} s")
        for node in self.cluster.nodes.values():
            node.is_cut_off = True
            self.cluster.later(lasts_s, partial(self.reach, node))

    def reach(self, node: Node) -> None:
        self.note(f"{node.name} is reached again")
        node.is_cut_off, node.blemished_at = False, self.cluster.now
        node.answered_at = self.cluster.now
        if node.is_evicted and self.random.random() < 0.8:  # its end was under way
            self.take_away(node)

    def isolate(self) -> None:
        """A member and the other members cannot reach each other, for a while or for good."""
        if node := self.victim():
            lasts_s = self.random.choice((self.random.uniform(0.5, 60.0), 1e9))
            self.note(f"{node.name} is isolated from the others for {lasts_s:.1f} s")
            node.is_isolated = True
            self.cluster.later(lasts_s, partial(self.join_again, node))

    def join_again(self, node: Node) -> None:
        node.is_isolated, node.blemished_at = False, self.cluster.now

    def part(self) -> None:
        """Two members cannot reach each other, for a while or for good."""
        one, other = self.victim(), self.victim()
        if one is not None and other is not None and one is not other:
            lasts_s = self.random.choice((self.random.uniform(0.5, 60.0), 1e9))
            self.note(f"{one.name} and {other.name} are parted for {lasts_s:.1f} s")
            self.cluster.network.part(one, other)
            self.cluster.later(lasts_s, partial(self.bring_together, one, other))

    def bring_together(self, one: Node, other: Node) -> None:
        self.cluster.network.join(one, other)
        one.blemished_at = other.blemished_at = self.cluster.now

    def slow_down(self) -> None:
        if node := self.victim():
            node.slowness = self.random.uniform(1.0, 4.0)
            self.note(f"{node.name} is {node.slowness:.1f} times slower")

    def fill(self) -> None:
        """A host's arena is full, as its store is slow: its member can end no step before there is room."""
        if node := self.victim():
            lasts_s = self.random.choice((self.random.uniform(1.0, 20.0), self.random.uniform(20.0, 600.0)))
            self.note(f"{node.name} has no room for {lasts_s:.1f} s")
            node.full_until = self.cluster.now + lasts_s

    def lose_state(self) -> None:
        """What all hold turns out to be of no use."""
        if (node := self.victim()) and node.inside:
            self.note(f"the state of world {node.inside} is disputed")
            self.cluster.give_up(node.inside)

    def raise_error(self) -> None:
        """The job raises in a step."""
        if (node := self.victim()) and node.inside and node.standing.committed > 2 and not node.faults:
            self.note(f"the job raises in {node.name}")
            self.cluster.refuse(node)

    def give_notice(self) -> None:
        """A machine will be taken away, and some time later is, whether its member has left or not."""
        if node := self.victim():
            self.cluster.give_notice(node)
            self.cluster.later(self.random.uniform(0.5, 60.0), partial(self.take_away, node))

    def give_everybody_notice(self) -> None:
        for node in list(self.cluster.nodes.values()):
            self.cluster.give_notice(node)
            self.cluster.later(self.random.uniform(20.0, 60.0), partial(self.take_away, node))

    def take_away(self, node: Node) -> None:
        if not self.cluster.is_gone(node):
            self.note(f"{node.name} is taken away")
            self.cluster.die(node)

    def calm(self) -> None:
        """No more blows fall by themselves: from here on the run has to get to its end."""
        self.cluster.is_chaotic = False

    def lease(self) -> None:
        """Members without a driver, and without a world, end with their lease."""
        for node in list(self.cluster.nodes.values()):
            if node.is_orphaned(self.cluster.now) and not node.inside and not node.faults:
                self.note(f"{node.name} has no driver")
                self.cluster.expire(node)
        self.cluster.later(1.0, self.lease)

    def note(self, what: str) -> None:
        self.story.append((self.cluster.now, "chaos", what))


def show(seed: int, stop_at_s: float | None = None) -> None:
    """Play a seed's run again, and print its whole story."""
    chaos = Chaos(seed, stop_at_s)
    try:
        chaos.run()
    finally:
        for at, who, what in chaos.story:
            print(f"{at:9.2f} {who:22} {what}")  # noqa: T201  (a person asked to see it)
