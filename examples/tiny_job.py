"""A whole job in few lines: learn the slope of a noisy line, on any number of workers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic import Split, seed_for


@dataclass
class LineSettings:
    slope: float = 3.0
    bias: bool = True


class LineJob:
    settings = LineSettings

    def model(self, settings: LineSettings) -> nn.Linear:
        return nn.Linear(1, 1, bias=settings.bias)

    def optimizer(self, model: nn.Linear) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def dataset(self, split: Split) -> Split:
        return split  # a real job opens split.source here

    def batch(self, dataset: Split, step: int, virtual_rank: int) -> tuple[Tensor, Tensor]:
        seed = dataset.seed + (dataset.name == "validation")
        chosen = torch.Generator().manual_seed(seed_for(seed, step, virtual_rank))
        x = torch.randn(dataset.micro_batch, 1, generator=chosen)
        return x, dataset.settings.slope * x

    def loss(self, model: nn.Linear, batch: tuple[Tensor, Tensor], rng: torch.Generator) -> Tensor:
        noise = 0.1 * torch.randn(batch[1].shape, generator=rng)
        return nn.functional.mse_loss(model(batch[0]), batch[1] + noise)
