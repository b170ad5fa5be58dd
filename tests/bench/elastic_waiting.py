"""Jobs on a machine that is as fast as their waits say: two cores cannot compute four ranks' work at once."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from elastic.training.gpt import GPTJob, GPTSettings
from elastic.training.job import Split

SMALL = GPTSettings(num_layers=1, width=8, num_heads=1, sequence=8)
NUM_LAYERS, WIDTH = 24, 512


class Computing(GPTJob):
    """The shipped job, which waits for nothing."""

    def __init__(self, _wait_s: float) -> None: ...


class Waiting(GPTJob):
    """The shipped job; a wait stands in for each micro-batch's computing."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        time.sleep(self._wait_s)
        return super().loss(model, batch, rng)


class _WaitBackward(torch.autograd.Function):
    """The identity, whose backward waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wait_s: float) -> Tensor:
        ctx.wait_s = wait_s
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.wait_s)
        return gradients[0], None


class WaitingLayers:
    """Layers of a mebibyte each; a wait stands in for each one's backward."""

    settings = dict

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s

    def model(self, settings: Any) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)

    def dataset(self, split: Split) -> Split:
        return split

    def batch(self, dataset: Split, step: int, virtual_rank: int) -> Tensor:
        return torch.full((dataset.micro_batch, WIDTH), float(step + virtual_rank + 1))

    def loss(self, model: Any, batch: Tensor, rng: torch.Generator) -> Tensor:
        x = batch
        for layer in getattr(model, "module", model):
            x = _WaitBackward.apply(layer(x), self._wait_s)
        return x.square().mean()
