"""The loop in a world of one: endings, save points, restores, failures of the user's code."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from checkpoint import LocalHost, Mismatch, Saver, load, open_store
from elastic.control.events import (
    CheckpointCaptured,
    CheckpointDurable,
    Ending,
    Event,
    StepCommitted,
    StepSkipped,
)
from elastic.control.standing import BLANK, Standing
from elastic.errors import JobRejected
from elastic.training.blame import UserFailure
from elastic.training.gpt import GPTJob, GPTSettings
from elastic.training.plan import TrainPlan
from elastic.training.ports import Broken, Flags
from elastic.training.state import weights_sha256
from elastic.training.trainer import Storage, Trainer

CPU = torch.device("cpu")
SETTINGS = GPTSettings(num_layers=1, num_heads=2, width=16, sequence=16, dropout=0.2)


@dataclass
class WorldOfOne:
    """A world of one rank, which breaks at agreement number `breaks_at`, counted from 0."""

    generation: int = 1
    breaks_at: int = -1
    rank: int = 0
    size: int = 1
    hosts: tuple[str, ...] = ("local",)
    num_agreements: int = field(default=0, init=False)

    def exchange(self, send: Any, receive: Any) -> None: ...

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        out.copy_(mine)

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> None:
        if self.num_agreements == self.breaks_at:
            try:
                raise RuntimeError("connection reset by peer")
            except RuntimeError as error:
                raise Broken(self.generation, str(error)) from None
        self.num_agreements += 1

    def beside(self, work: Callable[[], None]) -> None:
        work()

    def join(self) -> None: ...

    def send(self, tensor: Tensor, to: int) -> None: ...

    def receive(self, tensor: Tensor, source: int) -> None: ...


@dataclass
class Told:
    """Orders that never change."""

    flags: Flags = field(default_factory=Flags)

    def pending(self) -> Flags:
        return self.flags

    def check(self, generation: int) -> None: ...


@pytest.fixture
def plan(tmp_path) -> TrainPlan:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 40)
    return TrainPlan(6, 4, 2, 3, "bitwise", 1.0, 2, str(tmp_path / "text"), "run", "digest")


def trainer_of(plan: TrainPlan, job: Any = None, storage: Storage | None = None) -> Trainer:
    return Trainer(job or GPTJob(), SETTINGS, plan, member="a", device=CPU, storage=storage or Storage())


def trained(trainer: Trainer, generation: int = 1, told: Told | None = None) -> tuple[Ending, list[Event]]:
    events: list[Event] = []
    world = WorldOfOne(generation)
    trainer.settle(world)
    return trainer.run(world, told or Told(), events.append), events


def test_a_run_commits_every_step_once_and_tells_its_loss_and_tokens(plan):
    ending, events = trained(trainer_of(plan))
    steps = [event for event in events if isinstance(event, StepCommitted)]
    assert ending is Ending.FINISHED
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0].loss == pytest.approx(math.log(256), abs=1e-4)
    assert {event.tokens for event in steps} == {4 * 2 * 16}


def test_a_member_leaves_at_the_boundary_when_a_newer_world_was_ordered(plan):
    trainer = trainer_of(plan)
    ending, _ = trained(trainer, told=Told(Flags(next_generation=2)))
    assert (ending, trainer.standing) == (Ending.REGROUP, Standing(1))
    assert trained(trainer, 2)[0] is Ending.FINISHED


def test_going_through_broken_worlds_gives_the_bits_of_a_quiet_run(plan):
    quiet, troubled = trainer_of(plan), trainer_of(plan)
    trained(quiet)
    events: list[Event] = []
    for generation, breaks_at in enumerate((0, 2, 1, -1), 1):
        world = WorldOfOne(generation, breaks_at)
        try:
            settled = troubled.settle(world)
            assert settled.source == ("fresh" if generation == 1 else "self")
            troubled.run(world, Told(), events.append)
        except Broken:
            assert troubled.standing.reduced == troubled.standing.committed
    assert weights_sha256(quiet.model) == weights_sha256(troubled.model)
    assert [event.step for event in events if isinstance(event, StepCommitted)] == [1, 2, 3, 4, 5, 6]


def test_nothing_holds_a_broken_world_any_more(plan):
    trainer = trainer_of(plan)
    world = WorldOfOne(breaks_at=1)
    trainer.settle(world)
    gone = weakref.ref(world)
    gc.disable()
    try:
        with pytest.raises(Broken) as caught:
            trainer.run(world, Told(), lambda event: None)
        del world
        frames = [frame for frame in caught.traceback if "elastic" in str(frame.path)]
        assert caught.value.__context__ is None
        assert not any(isinstance(value, WorldOfOne) for frame in frames for value in frame.locals.values())
        del frames, caught
        assert gone() is None
    finally:
        gc.enable()


def test_a_stopped_run_goes_on_from_its_checkpoint_to_the_bits_of_an_undisturbed_one(plan):
    quiet = trainer_of(plan)
    trained(quiet)
    store = open_store("memory://trainer")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        stopped = trainer_of(plan, storage=Storage(saver))
        ending, events = trained(stopped, told=Told(Flags(stop=1)))
        assert (ending, stopped.standing) == (Ending.STOPPED, Standing(1))
        assert [event.step for event in events if isinstance(event, CheckpointCaptured)] == [1]
        assert [event.step for event in events if isinstance(event, CheckpointDurable)] == [1]
        resumed = trainer_of(plan, storage=Storage(saver, lambda: load(store)))
        assert resumed.settle(WorldOfOne(2)).source == "store"
        ending, events = trained(resumed, 2)
        assert ending is Ending.FINISHED
        assert [event.step for event in events if isinstance(event, CheckpointDurable)] == [2, 4, 6]
        saver.close()
    assert weights_sha256(resumed.model) == weights_sha256(quiet.model)


def test_a_last_step_that_only_memories_had_is_saved_again_before_the_run_is_called_finished(plan):
    older, newer = open_store("memory://older"), open_store("memory://newer")
    with LocalHost(older, arena_bytes=1 << 24) as host:
        trained(trainer_of(plan, storage=Storage(Saver(host, "run"))))
    loaded = load(older)
    in_memory = replace(loaded.report, bytes_by_source={"parity": 5, "memory": loaded.report.num_bytes})
    with LocalHost(newer, arena_bytes=1 << 24) as host:
        storage = Storage(Saver(host, "run"), lambda: replace(loaded, report=in_memory))
        resumed = trainer_of(plan, storage=storage)
        assert resumed.settle(WorldOfOne(2)).source == "memory+parity"
        events: list[Event] = []
        ending = resumed.run(WorldOfOne(2), Told(), events.append)
    assert ending is Ending.FINISHED
    assert [event.step for event in events if isinstance(event, CheckpointDurable)] == [6]


def test_a_checkpoint_of_another_model_or_seed_is_refused_by_name(plan):
    store = open_store("memory://another")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        trained(trainer_of(plan, storage=Storage(saver)))
        saver.close()
    storage = Storage(None, lambda: load(store))
    other = SETTINGS.model_copy(update={"width": 32})
    trainer = Trainer(GPTJob(), other, plan, member="a", device=CPU, storage=storage)
    with pytest.raises(Mismatch, match=r"out\.weight: float32\[16, 16\] there, float32\[32, 32\] here"):
        trainer.settle(WorldOfOne(9))
    assert trainer.standing.committed == BLANK
    with pytest.raises(Mismatch, match=r"training\.seed = 3"):
        trainer_of(replace(plan, seed=4), storage=storage).settle(WorldOfOne(9))


class FailingJob(GPTJob):
    """A job whose code fails once the model has learned for a while."""

    def batch(self, dataset: Any, step: int, virtual_rank: int) -> Tensor:
        if (step, virtual_rank) == (2, 1):
            raise ZeroDivisionError("no such luck")
        return super().batch(dataset, step, virtual_rank)


def test_an_exception_in_the_jobs_code_names_step_and_virtual_rank_and_brings_its_traceback(plan):
    trainer = trainer_of(plan, FailingJob())
    with pytest.raises(
        UserFailure, match=r"step 2, virtual rank 1: ZeroDivisionError: no such luck"
    ) as caught:
        trained(trainer)
    assert (caught.value.step, caught.value.virtual_rank) == (2, 1)
    assert "in batch" in caught.value.traceback
    assert trainer.standing == Standing(2)


class PoisonedJob(GPTJob):
    """A job whose third step has a loss that is no number."""

    poisoned = 2

    def __init__(self) -> None:
        self._step = 0

    def batch(self, dataset: Any, step: int, virtual_rank: int) -> Tensor:
        self._step = step
        return super().batch(dataset, step, virtual_rank)

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        return super().loss(model, batch, rng) * (math.nan if self._step == self.poisoned else 1.0)


def test_a_loss_that_is_no_number_ends_the_run_before_anything_of_its_step_is_applied(plan):
    trainer = trainer_of(plan, PoisonedJob())
    with pytest.raises(UserFailure, match=r"at step 2: the loss is nan.*nothing of it was applied"):
        trained(trainer)
    assert trainer.standing == Standing(2)
    clean, world = trainer_of(plan), WorldOfOne(breaks_at=2)
    clean.settle(world)
    with pytest.raises(Broken):
        clean.run(world, Told(), list[Event]().append)
    assert weights_sha256(trainer.model) == weights_sha256(clean.model)


def test_a_step_that_is_not_finite_is_skipped_and_told_where_the_plan_says_so(plan):
    trainer = trainer_of(replace(plan, when_not_finite="skip"), PoisonedJob())
    ending, events = trained(trainer)
    assert ending is Ending.FINISHED
    assert [event.step for event in events if isinstance(event, StepSkipped)] == [2]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class BatchNormJob(GPTJob):
    """A job whose model keeps running statistics."""

    def model(self, settings: Any) -> Any:
        model = super().model(settings)
        model.norm = nn.Sequential(  # type: ignore[assignment]  # a norm all the same
            nn.Flatten(0, 1), nn.BatchNorm1d(16), nn.Unflatten(0, (-1, 16))
        )
        return model


def test_a_model_with_running_statistics_is_refused_for_its_state_would_depend_on_the_world(plan):
    with pytest.raises(JobRejected, match="LayerNorm or GroupNorm for BatchNorm"):
        trained(trainer_of(plan, BatchNormJob()))


class ZeroingJob(GPTJob):
    """A job that takes the gradients away that it finds, or wipes or scales them."""

    def __init__(self, take: Callable[[Any], object]) -> None:
        self._take = take

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        self._take(model)
        return super().loss(model, batch, rng)


@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
@pytest.mark.parametrize(
    ("take", "words"),
    [
        (lambda model: model.zero_grad(), r"gradient in place of that of [\w.]+ "),
        (lambda model: model.zero_grad(set_to_none=False), "changed gradients "),
        (lambda model: model.head.zero_grad(set_to_none=False), "changed gradients "),
        (
            lambda model: torch._foreach_zero_([each.grad for each in model.parameters()]),
            "changed gradients ",
        ),
        (lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0), "changed gradients "),
    ],
)
def test_a_job_that_takes_the_trainers_gradients_away_is_refused_instead_of_learning_nothing(
    plan, determinism, take, words
):
    trainer = trainer_of(replace(plan, determinism=determinism), ZeroingJob(take))
    with pytest.raises(JobRejected, match=rf"{words}.*zero_grad"):
        trained(trainer)
    assert trainer.standing.committed == 0


class TwoPartsJob(GPTJob):
    """A job that goes back through half of its loss by itself."""

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        half = super().loss(model, batch, rng) / 2
        half.backward(retain_graph=True)
        return half


def test_a_job_that_only_adds_to_gradients_by_itself_learns_on(plan):
    assert trained(trainer_of(plan, TwoPartsJob()))[0] is Ending.FINISHED


def test_a_loss_that_is_not_a_number_is_told_as_it_is(plan):
    class NanJob(GPTJob):
        def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
            return super().loss(model, batch, rng) * math.nan

    _, events = trained(trainer_of(replace(plan, num_steps=1, when_not_finite="skip"), NanJob()))
    assert [math.isnan(event.loss) for event in events if isinstance(event, StepCommitted)] == [True]
