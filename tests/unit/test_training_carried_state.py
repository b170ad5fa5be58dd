"""The job's state goes to joiners and through checkpoints exactly, or is refused before anything is lost."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from elastic.errors import JobRejected
from elastic.training.blame import UserFailure
from elastic.training.trainer import Trainer
from tests.joining import (
    PLAN,
    ChosenJob,
    Net,
    finished,
    in_one_thread,
    joined,
    resumed_after_four,
    trainer_of,
)
from tests.unit.test_training_trainer import trained

Layout = dict[str, Any]
LAYOUTS: list[Layout] = [{}, {"optimizer_copies": 2}, {"parameter_copies": 2}]


__all__ = ["in_one_thread"]


class LowMomentum(Optimizer):
    """Momentum in bfloat16, and a count of steps in whole numbers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                self._update(parameter)

    def _update(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["count"] = torch.zeros((), dtype=torch.int64)
        state["count"] += 1
        assert parameter.grad is not None
        state["momentum"].mul_(0.9).add_(parameter.grad.to(torch.bfloat16))
        parameter.add_(state["momentum"].float(), alpha=-self.param_groups[0]["lr"])


def low(model: nn.Module) -> Optimizer:
    return LowMomentum(model.parameters())


def ends_alike(job: Any, plan: Any, name: str) -> Trainer:
    """See that survivor, joiner and a restored run end with the bits of a quiet one; return the joiner."""
    quiet = trainer_of(job, plan)
    trained(quiet)
    resumed = resumed_after_four(job, plan, name)
    survivor, newcomer = joined(job, plan)
    assert {finished(each) for each in (survivor, newcomer, resumed)} == {quiet.weights_sha256()}
    return newcomer


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_optimizer_state_of_other_dtypes_than_the_parameters_stays_what_it_is(layout: Layout, request: Any):
    ends_alike(ChosenJob(make_optimizer=low), replace(PLAN, **layout), request.node.name)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: schedules.MultiStepLR(optimizer, [2, 5, 5]),
        lambda optimizer: schedules.SequentialLR(
            optimizer,
            [schedules.ConstantLR(optimizer, 0.1), schedules.MultiStepLR(optimizer, [1, 3])],
            [3],
        ),
        lambda optimizer: schedules.ChainedScheduler(
            [schedules.MultiStepLR(optimizer, [2]), schedules.ExponentialLR(optimizer, 0.9)]
        ),
    ],
    ids=["MultiStepLR", "SequentialLR", "ChainedScheduler"],
)
def test_schedules_that_keep_counters_go_along(schedule: Any, request: Any):
    newcomer = ends_alike(ChosenJob(make_schedule=schedule), PLAN, request.node.name)
    live: Any = newcomer._learner._schedule  # type: ignore[union-attr]  # the replicated one
    if isinstance(live, schedules.MultiStepLR):
        assert type(live.milestones) is Counter


class WithExtra(Net):
    """A model with state beside its tensors: plain data and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale, "ranges": (torch.arange(3.0), "e4m3")}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


class OnlyGet(Net):
    """A model whose extra state nobody can give it."""

    def get_extra_state(self) -> Any:
        return {"scale": 1.0}


class OddExtra(WithExtra):
    """A model whose extra state has no plain form."""

    def get_extra_state(self) -> Any:
        return {"scale": print}


class RunningExtra(WithExtra):
    """A model whose forward changes its extra state."""

    def forward(self, images: Tensor) -> Any:
        self.scale += 1.0
        return super().forward(images)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_a_models_extra_state_of_plain_data_and_tensors_goes_along(layout: Layout, request: Any):
    ends_alike(ChosenJob(WithExtra), replace(PLAN, **layout), request.node.name)
    quiet, other = trainer_of(ChosenJob(WithExtra)), trainer_of(ChosenJob(WithExtra))
    other.model.scale = 2.0  # type: ignore[assignment]  # a module's attribute
    assert quiet.weights_sha256() != other.weights_sha256()


class WithFunction(torch.optim.AdamW):
    """An optimizer with a function among its hyperparameters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.param_groups[0]["penalty"] = lambda value: value


def with_function(model: nn.Module) -> Optimizer:
    return WithFunction(model.parameters())


class WithGlobal(torch.optim.AdamW):
    """An optimizer that keeps something of no parameter."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.state["global"] = {"n": torch.ones(1)}  # type: ignore[index]  # as some do
        return result


class WithObject(torch.optim.AdamW):
    """An optimizer that keeps an object without a plain form of each parameter, but torch's tensors too."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for state in self.state.values():
            state["tally"] = {1, 2}
        return result


@pytest.mark.parametrize(
    ("job", "layout", "words"),
    [
        (ChosenJob(make_optimizer=with_function), {}, "groups/0/penalty is a builtins.function"),
        (ChosenJob(make_optimizer=with_function), {"optimizer_copies": 2}, "groups/0/penalty"),
        (ChosenJob(make_optimizer=with_function), {"parameter_copies": 2}, "groups/0/penalty"),
        (ChosenJob(OnlyGet), {}, r"'' \(OnlyGet\) has get_extra_state and no set_extra_state"),
        (ChosenJob(OddExtra), {}, "_extra_state/scale is a builtins.builtin_function_or_method"),
        (ChosenJob(WithExtra), {"parameter_copies": 2}, "extra state.*training.parameter_copies = 0"),
    ],
)
def test_what_cannot_go_along_is_refused_when_the_first_worker_builds_it(
    job: Any, layout: Layout, words: str
):
    with pytest.raises(JobRejected, match=words):
        trainer_of(job, replace(PLAN, **layout))


def of(make: Callable[..., Optimizer]) -> Any:
    return ChosenJob(make_optimizer=lambda model: make(model.parameters()))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (of(WithGlobal), "keeps state under 'global', which is no parameter"),
        (of(WithObject), "tally is a builtins.set"),
        (ChosenJob(RunningExtra), "changes a buffer or extra state in its forward"),
    ],
)
def test_what_comes_with_the_first_step_and_cannot_go_along_is_refused_after_it(job: Any, words: str):
    trainer = trainer_of(job)
    with pytest.raises(JobRejected, match=words):
        trained(trainer)
    assert trainer.standing.committed <= 1


class Refusing(WithExtra):
    """A model that does not take the extra state that it gave."""

    def set_extra_state(self, state: Any) -> None:
        raise ValueError("an odd scale")


class Shy(schedules.ConstantLR):
    """A schedule whose state cannot be taken once it has begun."""

    def state_dict(self) -> Any:
        if self.last_epoch > 0:
            raise KeyError("nobody knows")
        return super().state_dict()


def test_what_the_jobs_objects_raise_when_state_is_taken_or_given_is_the_jobs_failure():
    with pytest.raises(UserFailure, match="ValueError: an odd scale") as caught:
        joined(ChosenJob(Refusing))
    assert "in set_extra_state" in caught.value.traceback
    with pytest.raises(UserFailure, match="KeyError: 'nobody knows'") as caught:
        trained(trainer_of(ChosenJob(make_schedule=Shy)))
    assert "in state_dict" in caught.value.traceback
