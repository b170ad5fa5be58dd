"""A sharded state that has to outlive its world: saved alone, saved after skipped steps, or made anew."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint import LocalHost, Saver, load, open_store
from elastic.control.standing import BLANK, Standing
from elastic.errors import JobRejected
from elastic.training.gpt import GPTJob
from elastic.training.plan import TrainPlan
from elastic.training.ports import Broken, Flags
from elastic.training.trainer import Storage, Trainer
from tests.unit.test_training_trainer import CPU, SETTINGS, PoisonedJob, Told, WorldOfOne, plan, trained

__all__ = ["plan"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "a sharded optimizer": {"optimizer_copies": 2},
    "sharded parameters": {"parameter_copies": 2},
}


@dataclass
class WorldOfTwins(WorldOfOne):
    """A world of two whose other rank stands and holds as this one does. No step can be taken in it."""

    size: int = 2
    hosts: tuple[str, ...] = ("local", "other")

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        out.copy_(mine.repeat(2))


@dataclass
class WorldOfAStray(WorldOfTwins):
    """The same, but the other one has no gradients of the next step."""

    num_gathered: int = 0

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        super().all_gather(out, mine)
        if self.num_gathered == 0:  # where each stands
            out[len(mine) + 1], out[len(mine) + 2 :] = BLANK, 0
        self.num_gathered += 1


class StopAtThree(Told):
    """Orders to stop once three steps are committed."""

    num_asked = 0

    def pending(self) -> Flags:
        self.num_asked += 1
        return Flags(stop=int(self.num_asked == 3))


class LostAtLeaf(Told):
    """Orders of a world that breaks before one of all virtual ranks' gradients is computed."""

    def __init__(self, leaf: int) -> None:
        super().__init__()
        self.left = leaf

    def check(self, generation: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Broken(generation, "a member died")


class LostAtAgreement(Told):
    """Orders of a world that breaks once the third step's gradients are reduced."""

    num_asked = 0

    def pending(self) -> Flags:
        self.num_asked += 1
        if self.num_asked == 3:
            raise Broken(1, "a member died")
        return Flags()


class FirstStepPoisoned(PoisonedJob):
    """A job whose first step has a loss that is no number."""

    poisoned = 0


class LateState(torch.optim.SGD):
    """An optimizer that has no state before its second step."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        for parameter in self.param_groups[0]["params"] if self.num_steps > 1 else ():
            self.state[parameter]["late"] = torch.ones(1)
        return super().step(closure)


class LateJob(GPTJob):
    """A job with such an optimizer."""

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return LateState(model.parameters(), lr=0.1)


@pytest.fixture(params=LAYOUTS)
def laid_out(request, plan):
    return replace(plan, save_every=100, **LAYOUTS[request.param])


@pytest.fixture
def stored(request) -> Any:
    """Storage for a run that saves, and one for the run that resumes it."""
    store = open_store(f"memory://{request.node.name}")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        yield Storage(saver), Storage(None, lambda: load(store))
        saver.close()


def test_the_state_that_a_lone_survivor_saves_resumes_to_the_bits_of_an_undisturbed_run(laid_out, stored):
    saving, resuming = stored
    quiet, orphan = trainer_of(laid_out), trainer_of(laid_out, storage=saving)
    trained(quiet)
    with pytest.raises(Broken):
        _train(orphan, WorldOfOne(1, breaks_at=2))
    orphan.settle(WorldOfTwins(2))
    assert orphan.save_alone(3, "local")
    resumed = trainer_of(laid_out, storage=resuming)
    assert resumed.settle(WorldOfOne(4)).step == orphan.standing.committed > 0
    _train(resumed, WorldOfOne(5))
    assert resumed.weights_sha256() == quiet.weights_sha256()


def test_gradients_that_were_held_across_a_settling_are_of_no_later_step(laid_out):
    quiet, survivor = trainer_of(laid_out), trainer_of(laid_out)
    trained(quiet)
    with pytest.raises(Broken):
        _train(survivor, WorldOfOne(1), LostAtAgreement())
    assert survivor.standing == Standing(2, reduced=2)
    survivor.settle(WorldOfAStray(2))
    assert survivor.standing == Standing(2)
    _train(survivor, WorldOfOne(3))
    assert survivor.weights_sha256() == quiet.weights_sha256()


def test_who_leaves_keeps_what_it_gave_and_goes_on_with_it_if_those_who_stay_die_just_then(laid_out):
    quiet, leaver = trainer_of(laid_out), trainer_of(laid_out)
    trained(quiet)
    with pytest.raises(Broken):
        _train(leaver, WorldOfOne(1, breaks_at=2))
    leaver.settle(WorldOfTwins(2), leaving=[0])
    assert leaver.is_whole
    _train(leaver, WorldOfOne(3))
    assert leaver.weights_sha256() == quiet.weights_sha256()


def test_a_checkpoint_after_a_skipped_first_step_has_the_optimizers_state(laid_out, stored):
    saving, resuming = stored
    skipping = replace(laid_out, when_not_finite="skip")
    quiet = trainer_of(skipping, FirstStepPoisoned())
    trained(quiet)
    trained(trainer_of(skipping, FirstStepPoisoned(), saving), told=StopAtThree())
    resumed = trainer_of(skipping, FirstStepPoisoned(), resuming)
    assert resumed.settle(WorldOfOne(2)).step == 3
    _train(resumed, WorldOfOne(3))
    assert resumed.weights_sha256() == quiet.weights_sha256()


def test_optimizer_state_that_comes_later_than_the_first_step_is_refused_and_not_left_out(plan, stored):
    sharding = replace(plan, optimizer_copies=1, save_every=3)
    with pytest.raises(JobRejected, match=r"'late'.*first step.*optimizer_copies = 0"):
        trained(trainer_of(sharding, LateJob(), stored[0]))


@pytest.mark.parametrize("leaf", [0, 10], ids=["in the first step", "two steps later"])
@pytest.mark.parametrize("layout", ["optimizer_copies", "parameter_copies"])
def test_lost_state_of_which_there_is_no_checkpoint_is_made_anew_as_often_as_need_be(plan, layout, leaf):
    sharding = replace(plan, **{layout: 1})
    quiet, survivor = trainer_of(sharding), trainer_of(sharding)
    trained(quiet)
    for generation, lost_at in ((1, 0), (5, leaf)):
        with pytest.raises(Broken, match="a member died"):
            _train(survivor, WorldOfOne(generation), LostAtLeaf(lost_at))
        survivor.settle(WorldOfTwins(generation + 1))  # the twin has the other half of the state from now on
        with pytest.raises(Broken, match="on lost ranks only"):
            survivor.settle(WorldOfOne(generation + 2))
        assert survivor.settle(WorldOfOne(generation + 3)).source == "fresh"
    _train(survivor, WorldOfOne(9))
    assert survivor.weights_sha256() == quiet.weights_sha256()


def trainer_of(plan: TrainPlan, job: Any = None, storage: Storage | None = None) -> Trainer:
    settings = SETTINGS.model_copy(update={"width": 32})  # so that some parameters have rows
    return Trainer(job or GPTJob(), settings, plan, member="a", device=CPU, storage=storage or Storage())


def _train(trainer: Trainer, world: WorldOfOne, told: Told | None = None) -> None:
    trainer.settle(world)
    trainer.run(world, told or Told(), _ignore)


_ignore: Callable[[Any], None] = list[Any]().append


class PartlyTrainedJob(GPTJob):
    """A job whose optimizer leaves some parameters alone."""

    schedule = None  # type: ignore[assignment]  # it needs none

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.blocks.parameters(), lr=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_no_optimizer_holds_is_compared_as_well(plan: TrainPlan, layout: str):
    watched = replace(plan, num_steps=2, compare_every=1, **LAYOUTS[layout])
    trainer = Trainer(PartlyTrainedJob(), SETTINGS, watched, member="a", device=CPU, storage=Storage())
    trained(trainer)
    names = [each.name for each in trainer._learner.replicas()]
    assert len(names) == len(set(names))
    assert {
        "model/head.weight",
        "model/blocks.0.up.weight",
        "optimizer/state/blocks.0.up.weight/exp_avg",
    } <= set(names)
