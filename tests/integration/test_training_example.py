"""The tiny job of the examples, trained in a world of one: it finds the slope of its line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from elastic.control.events import Ending
from elastic.training.job import load_job, load_settings
from elastic.training.plan import TrainPlan
from elastic.training.ports import Flags
from elastic.training.trainer import Storage, Trainer

PATH = "examples.tiny_job:LineJob"


class Alone:
    """A world of one."""

    generation, rank, size = 1, 0, 1
    hosts: tuple[str, ...] = ("here",)

    def exchange(self, send: Any, receive: Any) -> None: ...

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        out.copy_(mine)

    def all_reduce(self, tensor: torch.Tensor, op: str) -> None: ...

    def beside(self, work: Callable[[], None]) -> None:
        work()

    def join(self) -> None: ...

    def send(self, tensor: torch.Tensor, to: int) -> None: ...

    def receive(self, tensor: torch.Tensor, source: int) -> None: ...

    def pending(self) -> Flags:
        return Flags()

    def check(self, generation: int) -> None: ...


@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
def test_the_tiny_job_learns_its_line(determinism):
    job = load_job(PATH)
    plan = TrainPlan(60, 4, 8, 1, determinism, None, 100, "nothing", "run", "")
    settings = load_settings(job, {"slope": -2.0})
    trainer = Trainer(job, settings, plan, member="a", device=torch.device("cpu"), storage=Storage())
    world = Alone()
    trainer.settle(world)
    assert trainer.run(world, world, lambda event: None) is Ending.FINISHED
    assert trainer.model.get_parameter("weight").item() == pytest.approx(-2.0, abs=0.05)


def test_the_tiny_job_is_under_forty_lines(repository):
    assert len((repository / "examples" / "tiny_job.py").read_text().splitlines()) < 40
