"""Gradients and optimizer state lie in memory as their parameters do, as kernels count on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from elastic.training.gradients import GradientRows
from tests.joining import (
    PLAN,
    ChosenJob,
    Net,
    adam,
    finished,
    in_one_thread,
    joined,
    resumed_after_four,
    trainer_of,
)
from tests.unit.test_training_trainer import trained

__all__ = ["in_one_thread"]


class Transposed(Net):
    """A model whose matrix lies by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.weight = nn.Parameter(self.linear.weight.detach().t().contiguous().t())


def channels_last() -> nn.Module:
    model: nn.Module = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
    return model


def fused(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def foreach(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)


MODELS = pytest.mark.parametrize("model", [channels_last, Transposed])
LAYOUTS: list[dict[str, Any]] = [{}, {"optimizer_copies": 2}, {"parameter_copies": 2}]


@MODELS
@pytest.mark.parametrize("optimizer", [adam, fused, foreach])
@pytest.mark.parametrize("determinism", ["bitwise", "fast"])
def test_a_model_that_lies_otherwise_in_memory_learns_what_the_plain_one_learns(
    model: Any, optimizer: Any, determinism: Any
):
    plan = replace(PLAN, determinism=determinism)
    plain, other = trainer_of(ChosenJob(), plan), trainer_of(ChosenJob(model, optimizer), plan)
    trained(plain)
    trained(other)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


@MODELS
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_its_state_goes_to_joiners_and_through_checkpoints_and_ends_with_the_same_bits(
    model: Any, layout: Any, request: Any
):
    job, plan = ChosenJob(model, fused), replace(PLAN, **layout)
    quiet = trainer_of(job)
    trained(quiet)
    assert {finished(each) for each in joined(job, plan)} == {quiet.weights_sha256()}
    resumed = resumed_after_four(job, plan, request.node.name)
    assert finished(resumed) == quiet.weights_sha256()


class Odd(nn.Module):
    """Parameters that lie densely in another order, and with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.permuted = nn.Parameter(torch.zeros(2, 3, 4).permute(2, 0, 1))
        self.gaps = nn.Parameter(torch.zeros(4, 6)[:, ::2])


def test_gradients_have_the_strides_that_torch_gives_them():
    ours, torchs = Odd(), Odd()
    rows = GradientRows(ours, 1)
    rows.bind(rows.take())
    for each in torchs.parameters():
        (each * torch.rand(each.shape)).sum().backward()
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.stride() == other.grad.stride()
