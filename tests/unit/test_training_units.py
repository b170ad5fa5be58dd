"""A model under `fully_shard` in a world of one: which layers are units, ties, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.control.events import Ending
from elastic.control.resharding import Cut
from elastic.control.standing import BLANK
from elastic.errors import JobRejected
from elastic.training.blame import UserFailure
from elastic.training.gpt import GPTJob
from elastic.training.plan import TrainPlan
from elastic.training.units import Mould, Wires
from tests.unit.test_training_trainer import plan, trained, trainer_of

__all__ = ["plan"]  # a fixture
CPU = torch.device("cpu")


def alone(model: nn.Module) -> Any:
    mould = Mould(model)
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return mould.pour(Cut(1, 0), whole, CPU, Wires(lambda _, __: None, lambda _, __: None))


def test_items_of_lists_are_units_but_for_shared_ones_and_small_parameters_stay_whole():
    shared = nn.Linear(32, 32)
    tied = nn.Linear(32, 32)
    tied.weight = shared.weight
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 64), nn.GELU()), nn.Linear(64, 32), shared])
    model = nn.Module()
    model.blocks, model.head, model.odd = blocks, tied, nn.Linear(31, 3)
    sharded = alone(model)
    assert [list(unit) for unit in sharded.units] == [
        ["blocks.0.0.weight"],
        ["blocks.1.weight"],
        ["blocks.2.weight"],
    ]
    assert set(sharded.whole) == {
        *("blocks.0.0.bias", "blocks.1.bias", "blocks.2.bias"),
        *("head.bias", "odd.weight", "odd.bias"),
    }
    assert sharded.model.head.weight is sharded.model.blocks[2].weight


class Stack(nn.Module):
    """Layers that are gone through as often as told."""

    def __init__(self, num_times: int) -> None:
        super().__init__()
        self.num_times = num_times
        self.table = nn.Embedding(256, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32)])
        self.head = nn.Linear(32, 256)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for _ in range(self.num_times):
            for layer in self.layers:
                hidden = hidden + layer(hidden).tanh()
        logits: Tensor = self.head(hidden)
        return logits


class StackJob(GPTJob):
    """A job whose output layer is its embedding, and which may go through a layer twice."""

    schedule = None  # type: ignore[assignment]  # it needs none

    def __init__(self, num_times: int = 1) -> None:
        self._num_times = num_times

    def model(self, settings: Any) -> Any:
        return Stack(self._num_times)

    def optimizer(self, model: Any) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_a_model_with_tied_weights_learns_the_same_bits_in_shards(plan: TrainPlan):
    shas = set()
    for copies in (0, 1):
        trainer = trainer_of(replace(plan, parameter_copies=copies), StackJob())
        assert trained(trainer)[0] is Ending.FINISHED
        shas.add(trainer.weights_sha256())
    assert len(shas) == 1


class HollowJob(StackJob):
    """A job whose model has matrices without elements."""

    def model(self, settings: Any) -> Any:
        model = Stack(1)
        model.no_rows, model.no_columns = nn.Parameter(torch.zeros(0, 32)), nn.Parameter(torch.zeros(5, 0))
        return model


def test_matrices_without_elements_stay_whole_and_change_no_bit(plan: TrainPlan):
    shas = set()
    for copies in (0, 1):
        trainer = trainer_of(replace(plan, parameter_copies=copies), HollowJob())
        trained(trainer)
        shas.add(trainer.weights_sha256())
    assert len(shas) == 1


def test_a_layer_that_is_called_twice_in_a_forward_is_refused_with_the_remedy(plan: TrainPlan):
    with pytest.raises(JobRejected, match=r"training\.parameter_copies = 0"):
        trained(trainer_of(replace(plan, parameter_copies=1), StackJob(2)))


class PenaltyJob(StackJob):
    """A job with a penalty on its weights, or on gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        seen: list[Tensor] = []
        hook = model.layers[0].register_forward_pre_hook(lambda _, given: seen.extend(given))
        loss = super().loss(model, batch, rng)
        hook.remove()
        if self._kind == "weights":
            extra = torch.stack([each.square().sum() for each in model.parameters()]).sum()
        else:
            extra = torch.autograd.grad(loss, seen, create_graph=True)[0].square().mean()
        return loss + extra


@pytest.mark.parametrize(
    ("kind", "words"), [("weights", "Tensor and DTensor"), ("gradients", "storage of size 0")]
)
def test_a_loss_that_torch_cannot_shard_is_refused_with_the_remedy_and_its_words(
    plan: TrainPlan, kind: str, words: str
):
    trained(trainer_of(plan, PenaltyJob(kind)))
    with pytest.raises(JobRejected, match=rf"training\.parameter_copies = 0 .*virtual rank 0.*{words}"):
        trained(trainer_of(replace(plan, parameter_copies=1), PenaltyJob(kind)))


class AlikeJob(GPTJob):
    """The shipped job with all parameters in one group, as one of torch's optimizers likes them."""

    schedule = None  # type: ignore[assignment]  # it needs none

    def __init__(self, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
        self._kind, self._options = kind, options

    def optimizer(self, model: Any) -> Any:
        return self._kind(model.parameters(), **{"lr": 1e-2, **self._options})


def shas_of(plan: TrainPlan, job: Callable[[], Any]) -> list[str]:
    """Return what a job learns in replicas, and in shards."""
    shas = []
    for copies in (0, 1):
        trainer = trainer_of(replace(plan, parameter_copies=copies, num_steps=2), job())
        assert trained(trainer)[0] is Ending.FINISHED
        shas.append(trainer.weights_sha256())
    return shas


def test_the_shipped_job_learns_the_same_bits_in_shards_where_its_groups_hold_small_matrices_too(
    plan: TrainPlan,
):
    assert len(set(shas_of(plan, GPTJob))) == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.Adadelta, {"foreach": True}),
    ],
)
def test_a_group_of_rows_and_small_whole_parameters_learns_the_same_bits_in_shards(
    plan: TrainPlan, kind: type[torch.optim.Optimizer], options: dict[str, Any]
):
    assert len(set(shas_of(plan, lambda: AlikeJob(kind, options)))) == 1


class RenewingSGD(torch.optim.SGD):
    """Keeps an average of a group's gradients, in new tensors every time."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it has no loss to return
        for group in self.param_groups:
            gradients = [parameter.grad for parameter in group["params"]]
            before = [self.state[each].get("average", torch.zeros_like(each)) for each in group["params"]]
            averages = torch._foreach_lerp(before, gradients, 0.1)
            torch._foreach_add_([each.data for each in group["params"]], averages, alpha=-group["lr"])
            for parameter, average in zip(group["params"], averages, strict=True):
                self.state[parameter]["average"] = average


def test_what_an_optimizer_keeps_of_small_parameters_beside_rows_can_be_saved(plan: TrainPlan):
    trainer = trainer_of(replace(plan, parameter_copies=1), AlikeJob(RenewingSGD, {}))
    trained(trainer)
    kept = trainer._learner.whole_tree(6)["optimizer"]["state"]["embedding.weight"]
    assert type(kept["average"]) is Tensor


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"fused": True}), (torch.optim.Rprop, {})],
)
def test_an_optimizer_that_torch_cannot_apply_to_rows_is_refused_with_the_remedy(
    plan: TrainPlan, kind: type[torch.optim.Optimizer], options: dict[str, Any]
):
    trainer = trainer_of(replace(plan, parameter_copies=1), AlikeJob(kind, options))
    with pytest.raises(JobRejected, match=r"torch cannot apply .* to rows.*training\.parameter_copies = 0"):
        trained(trainer)
    assert trainer.standing.committed == BLANK  # nobody may take what the optimizer left halfway


class ReadingJob(StackJob):
    """A job that uses sharded parameters where torch says nothing."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], *, is_optimizers: bool = False) -> None:
        super().__init__()
        self._use, self._is_optimizers = use, is_optimizers

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        loss = super().loss(model, batch, rng)
        return loss if self._is_optimizers else self._use(model.layers[0].weight, loss)

    def optimizer(self, model: Any) -> Any:
        if self._is_optimizers:
            self._use(model.layers[0].weight, torch.zeros(()))
        return super().optimizer(model)


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda weight, loss: loss * weight.norm().item(), r"layers\.0\.weight"),
        (lambda weight, loss: loss + float(weight.detach().square().mean()), "a parameter or its gradient"),
        (lambda weight, loss: loss if weight.isfinite().all() else loss * 0, "a parameter or its gradient"),
    ],
)
def test_a_loss_that_takes_something_of_this_workers_rows_for_the_whole_is_refused_by_name(
    plan: TrainPlan, use: Callable[[Any, Tensor], Tensor], named: str
):
    trained(trainer_of(replace(plan, num_steps=1), ReadingJob(use)))
    trainer = trainer_of(replace(plan, parameter_copies=1), ReadingJob(use))
    with pytest.raises(JobRejected, match=rf"{named}.*training\.parameter_copies = 0"):
        trained(trainer)
    assert trainer.standing.committed == 0
    weight = trainer.model.get_parameter("layers.0.weight").detach()
    assert float(weight.norm())  # outside of the job torch is as ever


def test_an_optimizer_that_is_made_by_numbers_of_this_workers_rows_is_refused_by_name(plan: TrainPlan):
    job = ReadingJob(lambda weight, loss: loss * weight.norm().item(), is_optimizers=True)
    with pytest.raises(JobRejected, match=r"optimizer reads .* layers\.0\.weight .*parameter_copies = 0"):
        trained(trainer_of(replace(plan, parameter_copies=1), job))


class CalmedSGD(torch.optim.SGD):
    """Looks from its third step on for the largest gradient."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it has no loss to return
        self.num_steps += 1
        for parameter in self.param_groups[0]["params"] if self.num_steps > 2 else []:
            if float(parameter.grad.abs().max()) > 1e-9:
                parameter.grad.mul_(0.5)
        super().step(closure)


def test_an_optimizer_that_reads_numbers_in_a_later_step_is_refused_in_that_step(plan: TrainPlan):
    trainer = trainer_of(replace(plan, parameter_copies=1), AlikeJob(CalmedSGD, {}))
    with pytest.raises(JobRejected, match=r"optimizer reads a number .*parameter_copies = 0"):
        trained(trainer)
    assert trainer.standing.committed == BLANK  # nobody may take what the optimizer left halfway


def test_an_optimizer_that_cannot_be_made_of_rows_is_the_jobs_failure_and_no_machines(plan: TrainPlan):
    job = ReadingJob(lambda weight, loss: loss * weight.tolist()[0][0], is_optimizers=True)
    with pytest.raises(UserFailure, match=r"at step 0: .*tolist"):
        trained(trainer_of(replace(plan, parameter_copies=1), job))


class NormedSGD(torch.optim.SGD):
    """Steps of a length that depends on a whole tensor, as LARS."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it has no loss to return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(1 / (1e-3 + float(parameter.grad.norm())))
        super().step(closure)


class NormedJob(StackJob):
    """A job with an optimizer that takes norms."""

    def optimizer(self, model: Any) -> Any:
        return NormedSGD(model.parameters(), lr=1e-2)


def test_an_optimizer_that_needs_whole_tensors_is_refused_before_it_does_harm(plan: TrainPlan):
    trainer = trainer_of(replace(plan, parameter_copies=1), NormedJob())
    with pytest.raises(JobRejected, match="does not treat elements one by one"):
        trained(trainer)
    assert trainer.standing.committed == BLANK  # nobody may take what the optimizer left halfway
