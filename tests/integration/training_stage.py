"""A stage for tests: processes that live through stories of worlds which form, break and grow."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any, Literal

import torch

from checkpoint import Catalog, LocalHost, Saver, Store, claim_generation, load, open_store
from elastic.control.events import Ending, Event, ReplicaHealed, StepCommitted
from elastic.runtime.world import Endpoint, Former, Place, World, open_rendezvous
from elastic.training.fully_sharded import FullyShardedLearner
from elastic.training.gpt import GPTJob, GPTSettings
from elastic.training.holdings import local_rows
from elastic.training.plan import TrainPlan
from elastic.training.ports import Broken, Flags
from elastic.training.sharding import ShardedLearner
from elastic.training.trainer import Storage, Trainer

LOOPBACK, CPU = "127.0.0.1", torch.device("cpu")
NUM_STEPS = 14
SETTINGS = GPTSettings(num_layers=2, num_heads=2, width=32, sequence=32, dropout=0.2)
BUCKETS_MIB = (0.02, 0.0, 4.0)  # stories take turns: their bits must not tell
SLOW_S = 0.15
Phase = Literal[
    "leaf", "exchange", "all_gather", "agreement", "agreed", "compare", "sharing", "sending", "send"
]


@dataclass(frozen=True)
class Chapter:
    """A world in a story: its members by rank, the step at whose boundary it ends, or who dies when.

    A bit flips in `flipped` once it has committed `flips_at` steps and has the next one's gradients, and in
    `spoiled` before its state settles in this world. Where members are `leaving`, it only settles.
    """

    members: tuple[int, ...]
    until: int = NUM_STEPS
    victim: int = -1
    dies_at: int = -1
    phase: Phase = "leaf"
    flipped: int = -1
    flips_at: int = -1
    spoiled: int = -1
    slow: int = -1
    leaving: tuple[int, ...] = ()


@dataclass(frozen=True)
class Props:
    """What all stories of a performance share: the text to train on, and how the state lies on the ranks.

    With a `store` every second step is saved there.
    """

    source: str
    optimizer_copies: int = 0
    parameter_copies: int = 0
    store: str | None = None
    width: int = SETTINGS.width


@dataclass
class Doom:
    """Kills this process, by SIGKILL, once it comes to a phase of a step, and what was saved is durable."""

    chapter: Chapter
    committed: Callable[[], int]
    is_victim: bool
    store: Store | None = None

    def comes(self, phase: Phase) -> None:
        if self.is_victim and self.chapter.phase == phase and self.committed() >= self.chapter.dies_at:
            deadline = time.monotonic() + 60
            while self.store and not Catalog(self.store).steps() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


class DoomedWorld:
    """A real world whose member may die between two calls."""

    def __init__(self, world: World, doom: Doom) -> None:
        self.generation, self.rank, self.size, self.hosts = (
            world.generation,
            world.rank,
            world.size,
            world.hosts,
        )
        self._world, self._doom = world, doom
        self._is_agreed = False

    def exchange(self, send: Any, receive: Any) -> None:
        self._is_agreed = False
        self._doom.comes("exchange")
        self._world.exchange(send, receive)

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        if mine.is_floating_point():
            self._doom.comes("sharing" if self._is_agreed else "all_gather")
        elif self._is_agreed:
            self._doom.comes("compare")
        self._world.all_gather(out, mine)

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        self._doom.comes("agreement")
        self._world.all_reduce(tensor, op)
        self._is_agreed = True
        self._doom.comes("agreed")

    def beside(self, work: Callable[[], None]) -> None:
        self._world.beside(work)

    def join(self) -> None:
        self._world.join()

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._doom.comes("sending")
        self._world.send(tensor, to)
        self._doom.comes("send")

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        self._world.receive(tensor, source)


class DoomedJob(GPTJob):
    """The shipped job, whose process may die in the middle of a micro-batch."""

    doom: Doom | None = None
    wait_s = 0.0
    num_losses = 0

    def loss(self, model: Any, batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        if self.doom is not None:
            self.doom.comes("leaf")
        time.sleep(self.wait_s)
        self.num_losses += 1
        return super().loss(model, batch, rng)


@dataclass
class Diary:
    """What one member saw."""

    sources: list[str] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)
    sha256: str = ""
    state_bytes: int = 0
    num_losses: int = 0
    healed: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def write(self, event: Event) -> None:
        if isinstance(event, StepCommitted):
            self.steps.append((event.step, event.loss))
        if isinstance(event, ReplicaHealed):
            self.healed.append((event.step, event.tensors))


class Boundary:
    """Orders the next world once a step is committed; may flip a bit when all gradients are reduced."""

    def __init__(
        self, chapter: Chapter, generation: int, committed: Callable[[], int], flip: Callable[[int], None]
    ) -> None:
        self._chapter, self._generation, self._committed = chapter, generation, committed
        self._flip = flip

    def pending(self) -> Flags:
        if self._committed() == self._chapter.flips_at:
            self._flip(self._chapter.flipped)
        is_due = self._committed() + 1 >= self._chapter.until < NUM_STEPS
        return Flags(next_generation=self._generation + 1 if is_due else 0)

    def check(self, generation: int) -> None: ...


def live(
    member: int,
    stories: dict[str, list[Chapter]],
    endpoint: Endpoint,
    props_of: Mapping[str, Props],
    told: "Queue[Any]",
) -> None:
    """Live through every story, telling what became of each."""
    torch.set_num_threads(1)
    former = Former(LOOPBACK, CPU)
    first_generation = 1
    for name, chapters in stories.items():
        props = props_of[name]
        plan = TrainPlan(
            *(NUM_STEPS, 8, 2, 7, "bitwise", 1.0, 2 if props.store else 5, props.source, "run", ""),
            compare_every=1,
            bucket_mib=BUCKETS_MIB[first_generation % len(BUCKETS_MIB)],
            optimizer_copies=props.optimizer_copies,
            parameter_copies=props.parameter_copies,
        )
        job, diary = DoomedJob(), Diary()
        store = open_store(f"{props.store}/{name}") if props.store else None
        storage = _storage(store, str(member)) if store else Storage()
        settings = SETTINGS.model_copy(update={"width": props.width})
        trainer = Trainer(job, settings, plan, member=str(member), device=CPU, storage=storage)
        for generation, chapter in enumerate(chapters, first_generation):
            if member in chapter.members:
                play(member, (generation, chapter, store), (former, endpoint), (trainer, job, diary))
        first_generation += len(chapters)
        told.put((name, member, diary))
    told.close()
    told.join_thread()


def _state_bytes(trainer: Trainer) -> int:
    """Return the bytes of optimizer state that this process holds, if it is sharded."""
    match trainer._learner:
        case ShardedLearner() as learner:
            states = learner._learner.optimizer.state
        case FullyShardedLearner() as learner:
            states = learner.live.learner.optimizer.state
        case _:
            return 0
    return sum(local_rows(tensor).nbytes for state in states.values() for tensor in state.values())


def _victim(trainer: Trainer) -> torch.Tensor:
    """Return a matrix of which this process holds something that others hold too."""
    name = "blocks.0.up.weight"
    if isinstance(trainer._learner, ShardedLearner):
        learner = trainer._learner
        name = next(learner._names[n] for n in sorted(learner._mine) if learner._parameters[n].dim() == 2)
    return trainer.model.get_parameter(name)


def play(
    member: int,
    scene: tuple[int, Chapter, Store | None],
    stage: tuple[Former, Endpoint],
    cast: tuple[Trainer, DoomedJob, Diary],
) -> None:
    """Live through one world."""
    (generation, chapter, store), (former, endpoint), (trainer, job, diary) = scene, stage, cast

    def committed() -> int:
        return trainer.standing.committed

    hosts = tuple(map(str, chapter.members))
    place = Place(generation, chapter.members.index(member), hosts, LOOPBACK)

    def flip(victim: int) -> None:
        if member == victim:
            local_rows(_victim(trainer)).view(torch.int32)[3, 5] ^= 1 << 20

    world = former.form(place, endpoint, lambda: True, time.sleep)
    if store:  # as a driver does, so that nobody waits for long for the dead of an older world
        claim_generation(store, generation, "stage")
    job.wait_s = SLOW_S if member == chapter.slow else 0.0
    job.doom = Doom(chapter, committed, member == chapter.victim, store)
    doomed = DoomedWorld(world, job.doom)
    flip(chapter.spoiled)
    try:
        leaving = [chapter.members.index(one) for one in chapter.leaving]
        diary.sources.append(trainer.settle(doomed, leaving).source)
        if (
            not leaving
            and trainer.run(doomed, Boundary(chapter, generation, committed, flip), diary.write)
            is Ending.FINISHED
        ):
            diary.sha256 = trainer.weights_sha256()
            diary.state_bytes = _state_bytes(trainer)
            diary.num_losses = job.num_losses
    except Broken as broken:
        broken.__traceback__ = None
        diary.broken.append(broken.why)
    finally:
        world.leave()


def _storage(store: Store, member: str) -> Storage:
    """Let this process save, as a host of its own, and restore."""
    saver = Saver(LocalHost(store, arena_bytes=1 << 24, host=member), "run")
    return Storage(saver, lambda: load(store) if Catalog(store).steps() else None)


def _num_lived_through(member: int, stories: Mapping[str, list[Chapter]]) -> int:
    """Count the stories that a member comes to the end of: those before the one it dies in."""
    lives = [all(each.victim != member for each in chapters) for chapters in stories.values()]
    return [*lives, False].index(False)


def perform(
    stories: dict[str, list[Chapter]], props: Props | Mapping[str, Props]
) -> dict[str, dict[int, Diary]]:
    """Let processes live through the stories; return the diaries of those who came to the end of each."""
    props = dict.fromkeys(stories, props) if isinstance(props, Props) else props
    store, endpoint = open_rendezvous(LOOPBACK)
    context = get_context("spawn")
    told = context.Queue()
    arguments = (stories, endpoint, props, told)
    told_of = [chapter for chapters in stories.values() for chapter in chapters]
    num_members = 1 + max(member for chapter in told_of for member in chapter.members)
    members = [context.Process(target=live, args=(member, *arguments)) for member in range(num_members)]
    for process in members:
        process.start()
    victims = {chapter.victim for chapter in told_of} - {-1}
    diaries: dict[str, dict[int, Diary]] = {name: {} for name in stories}
    try:
        for _ in range(sum(_num_lived_through(member, stories) for member in range(num_members))):
            name, member, diary = told.get(timeout=150)
            diaries[name][member] = diary
        for process in members:
            process.join(timeout=20)
    finally:
        for process in members:
            process.kill()
    codes = [process.exitcode for process in members]
    assert codes == [-signal.SIGKILL if member in victims else 0 for member in range(num_members)]
    del store
    return diaries
