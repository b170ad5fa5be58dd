"""Training in real worlds of real processes: whoever takes part, dies or joins, the bits are the same."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any, Literal

import pytest
import torch

from elastic.control.events import Ending, Event, ReplicaHealed, StepCommitted
from elastic.runtime.world import Endpoint, Former, Place, World, open_rendezvous
from elastic.training.gpt import GPTJob, GPTSettings
from elastic.training.ports import Broken, Flags
from elastic.training.state import weights_sha256
from elastic.training.trainer import Storage, Trainer, TrainPlan

pytestmark = [pytest.mark.timeout(110), pytest.mark.slow]

LOOPBACK, CPU = "127.0.0.1", torch.device("cpu")
NUM_STEPS, NUM_MEMBERS = 14, 7
SETTINGS = GPTSettings(num_layers=2, num_heads=2, width=32, sequence=32, dropout=0.2)
Phase = Literal["leaf", "exchange", "all_gather", "agreement", "agreed", "send"]


@dataclass(frozen=True)
class Chapter:
    """A world in a story: its members by rank, the step at whose boundary it ends, or who dies when."""

    members: tuple[int, ...]
    until: int = NUM_STEPS
    victim: int = -1
    dies_at: int = -1
    phase: Phase = "leaf"
    flipped: int = -1
    flips_at: int = -1


QUIET = {f"a world of {size}": [Chapter(tuple(range(size)))] for size in range(1, 6)}
CHURN = [
    Chapter((0, 1, 2, 3), victim=3, dies_at=2, phase="leaf"),
    Chapter((0, 1, 2), victim=1, dies_at=4, phase="exchange"),
    Chapter((0, 2), until=6),
    Chapter((0, 2, 4, 5), victim=5, dies_at=7, phase="agreement"),
    Chapter((0, 2, 4), victim=0, dies_at=9, phase="agreed"),
    Chapter((2, 4, 6), victim=2, dies_at=9, phase="send"),
    Chapter((4, 6), victim=6, dies_at=11, phase="all_gather"),
    Chapter((4,)),
]


FLIP = [Chapter((0, 1, 2), flipped=1, flips_at=3)]


@dataclass
class Doom:
    """Kills this process, by SIGKILL, once it comes to a phase of a step."""

    chapter: Chapter
    committed: Callable[[], int]
    is_victim: bool

    def comes(self, phase: Phase) -> None:
        if self.is_victim and self.chapter.phase == phase and self.committed() >= self.chapter.dies_at:
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

    def exchange(self, send: Any, receive: Any) -> None:
        self._doom.comes("exchange")
        self._world.exchange(send, receive)

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        if mine.is_floating_point():
            self._doom.comes("all_gather")
        self._world.all_gather(out, mine)

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        self._doom.comes("agreement")
        self._world.all_reduce(tensor, op)
        self._doom.comes("agreed")

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self._world.send(tensor, to)
        self._doom.comes("send")

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        self._world.receive(tensor, source)


class DoomedJob(GPTJob):
    """The shipped job, whose process may die in the middle of a micro-batch."""

    doom: Doom | None = None

    def loss(self, model: Any, batch: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        if self.doom is not None:
            self.doom.comes("leaf")
        return super().loss(model, batch, rng)


@dataclass
class Diary:
    """What one member saw."""

    sources: list[str] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)
    sha256: str = ""
    healed: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def write(self, event: Event) -> None:
        if isinstance(event, StepCommitted):
            self.steps.append((event.step, event.loss))
        if isinstance(event, ReplicaHealed):
            self.healed.append((event.step, event.tensors))


class Boundary:
    """Orders the next world once a step is committed; may flip a bit when all gradients are reduced."""

    def __init__(
        self, chapter: Chapter, generation: int, committed: Callable[[], int], flip: Callable[[], None]
    ) -> None:
        self._chapter, self._generation, self._committed = chapter, generation, committed
        self._flip = flip

    def pending(self) -> Flags:
        if self._committed() == self._chapter.flips_at:
            self._flip()
        is_due = self._committed() + 1 >= self._chapter.until < NUM_STEPS
        return Flags(next_generation=self._generation + 1 if is_due else 0)

    def check(self, generation: int) -> None: ...


def live(
    member: int, stories: dict[str, list[Chapter]], endpoint: Endpoint, source: str, told: "Queue[Any]"
) -> None:
    """Live through every story, telling what became of each."""
    torch.set_num_threads(1)
    former = Former(LOOPBACK, CPU)
    first_generation = 1
    for name, chapters in stories.items():
        plan = TrainPlan(NUM_STEPS, 8, 2, 7, "bitwise", 1.0, 5, source, "run", "", compare_every=1)
        job, diary = DoomedJob(), Diary()
        trainer = Trainer(job, SETTINGS, plan, member=str(member), device=CPU, storage=Storage())
        for generation, chapter in enumerate(chapters, first_generation):
            if member in chapter.members:
                play(member, (generation, chapter), (former, endpoint), (trainer, job, diary))
        first_generation += len(chapters)
        told.put((name, member, diary))
    told.close()
    told.join_thread()


def play(
    member: int,
    scene: tuple[int, Chapter],
    stage: tuple[Former, Endpoint],
    cast: tuple[Trainer, DoomedJob, Diary],
) -> None:
    """Live through one world."""
    (generation, chapter), (former, endpoint), (trainer, job, diary) = scene, stage, cast

    def committed() -> int:
        return trainer.standing.committed

    place = Place(generation, chapter.members.index(member), ("here",) * len(chapter.members), LOOPBACK)

    def flip() -> None:
        if member == chapter.flipped:
            weight = trainer.model.get_parameter("blocks.0.up.weight").detach().view(torch.int32)
            weight[3, 5] ^= 1 << 20

    world = former.form(place, endpoint, lambda: True, time.sleep)
    job.doom = Doom(chapter, committed, member == chapter.victim)
    doomed = DoomedWorld(world, job.doom)
    try:
        diary.sources.append(trainer.settle(doomed).source)
        if (
            trainer.run(doomed, Boundary(chapter, generation, committed, flip), diary.write)
            is Ending.FINISHED
        ):
            diary.sha256 = weights_sha256(trainer.model)
    except Broken as broken:
        broken.__traceback__ = None
    finally:
        world.leave()


def perform(stories: dict[str, list[Chapter]], source: str) -> dict[str, dict[int, Diary]]:
    """Let processes live through the stories; return the diaries of those who came to the end of each."""
    store, endpoint = open_rendezvous(LOOPBACK)
    context = get_context("spawn")
    told = context.Queue()
    arguments = (stories, endpoint, source, told)
    members = [context.Process(target=live, args=(member, *arguments)) for member in range(NUM_MEMBERS)]
    for process in members:
        process.start()
    victims = {chapter.victim for chapters in stories.values() for chapter in chapters} - {-1}
    diaries: dict[str, dict[int, Diary]] = {name: {} for name in stories}
    try:
        for _ in range(len(stories) * NUM_MEMBERS - len(victims)):
            name, member, diary = told.get(timeout=80)
            diaries[name][member] = diary
        for process in members:
            process.join(timeout=20)
    finally:
        for process in members:
            process.kill()
    assert [process.exitcode for process in members] == [
        -signal.SIGKILL if member in victims else 0 for member in range(NUM_MEMBERS)
    ]
    del store
    return diaries


@pytest.fixture(scope="module")
def performed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Diary]]:
    text = tmp_path_factory.mktemp("data") / "text"
    text.write_text("".join(f"{number} is followed by {number + 1}.\n" for number in range(4000)))
    return perform({**QUIET, "flip": FLIP, "churn": CHURN}, str(text))


def test_worlds_of_every_size_and_a_world_that_loses_and_gains_members_end_with_the_same_bits(performed):
    finished = {
        name: {diary.sha256 for diary in diaries.values()} - {""} for name, diaries in performed.items()
    }
    assert all(len(hashes) == 1 for hashes in finished.values()), finished
    assert len(set.union(*finished.values())) == 1, finished


def test_every_committed_step_has_the_same_loss_in_every_world_and_none_is_committed_twice(performed):
    expected = performed["a world of 1"][0].steps
    assert [step for step, _ in expected] == list(range(1, NUM_STEPS + 1))
    for name, diaries in performed.items():
        for member, diary in diaries.items():
            assert set(diary.steps) <= set(expected), (name, member)
            assert len({step for step, _ in diary.steps}) == len(diary.steps), (name, member)


def test_survivors_keep_their_state_and_joiners_get_theirs_from_a_peer(performed):
    assert performed["churn"][4].sources == ["peer", "self", "self", "self", "self"]
    assert [step for step, _ in performed["churn"][4].steps] == list(range(7, NUM_STEPS + 1))
    assert all(diary.sources[0] == "fresh" for diary in performed["a world of 5"].values() if diary.sources)


def test_a_bit_that_flips_in_one_replica_is_found_named_and_healed_by_the_majority(performed):
    assert performed["flip"][1].healed == [(4, ("model/blocks.0.up.weight",))]
    assert performed["flip"][0].healed == performed["flip"][2].healed == []
    assert not any(diary.healed for name in performed if name != "flip" for diary in performed[name].values())
