"""A small job whose model, optimizer and schedule a test chooses, and a joiner that is given its state."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoint import LocalHost, Saver, load, open_store
from elastic.training.plan import TrainPlan
from elastic.training.ports import Flags
from elastic.training.trainer import Storage, Trainer
from tests.unit.test_training_replicas import worlds_of
from tests.unit.test_training_trainer import CPU, Told, WorldOfOne, trained

PLAN = TrainPlan(8, 4, 2, 7, "bitwise", 1.0, 100, "none", "run", "digest")


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    """Let a test's small tensors not wait for each other's threads."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


class Net(nn.Module):
    """Two convolutions and a matrix; some of their parameters have rows that can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 13, 1), nn.Linear(13, 32)

    def forward(self, images: Tensor) -> Any:
        return self.linear(torch.relu(self.second(torch.relu(self.first(images)))).mean((2, 3)))


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@dataclass(frozen=True)
class NoSettings:
    """There are none."""


@dataclass(frozen=True)
class ChosenJob:
    """A job of parts."""

    make_model: Callable[[], nn.Module] = Net
    make_optimizer: Callable[[nn.Module], Optimizer] = adam
    make_schedule: Callable[[Optimizer], Any] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 / (step + 1)
    )
    settings = NoSettings

    def model(self, settings: Any) -> nn.Module:
        return self.make_model()

    def optimizer(self, model: nn.Module) -> Optimizer:
        return self.make_optimizer(model)

    def schedule(self, optimizer: Optimizer, num_steps: int) -> Any:
        return self.make_schedule(optimizer)

    def dataset(self, split: Any) -> None:
        return None

    def batch(self, dataset: None, step: int, virtual_rank: int) -> Tensor:
        return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(97 * step + virtual_rank))

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        return loss


def trainer_of(job: Any, plan: TrainPlan = PLAN, storage: Storage | None = None, name: str = "a") -> Trainer:
    return Trainer(job, None, plan, member=name, device=CPU, storage=storage or Storage())


class StopAfter(Told):
    """Orders of a newer world, once so many steps are committed."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        super().__init__()
        self._trainer, self._step = trainer, step

    def pending(self) -> Any:
        return Flags(next_generation=99 if self._trainer.standing.committed + 1 >= self._step else 0)


def joined(job: Any, plan: TrainPlan = PLAN, at: int = 3) -> tuple[Trainer, Trainer]:
    """Train to a step, and give the state to a newcomer; return who gave and who was given."""
    survivor, newcomer = trainer_of(job, plan), trainer_of(job, plan, name="b")
    trained(survivor, told=StopAfter(survivor, at))
    with ThreadPoolExecutor(2) as ranks:
        worlds = [replace(world, hosts=("local", "other")) for world in worlds_of(2)]
        list(ranks.map(lambda pair: pair[0].settle(pair[1]), zip((survivor, newcomer), worlds, strict=True)))
    assert newcomer.standing == survivor.standing
    return survivor, newcomer


def finished(trainer: Trainer, generation: int = 5) -> str:
    """Train to the end, alone; return the hash of the weights."""
    trainer.settle(WorldOfOne(generation))
    trainer.run(WorldOfOne(generation), Told(), lambda event: None)
    return trainer.weights_sha256()


def resumed_after_four(job: Any, plan: Any, name: str) -> Trainer:
    """Save at step 4, and give the state to another run."""
    store = open_store(f"memory://{name}")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        trained(trainer_of(job, replace(plan, num_steps=4, save_every=4), Storage(saver)))
        resumed = trainer_of(job, plan, Storage(None, lambda: load(store)))
        assert resumed.settle(WorldOfOne(2)).step == 4
        saver.close()
    return resumed
