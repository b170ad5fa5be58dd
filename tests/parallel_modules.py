"""A small model as whole, stage or expert parallel modules, which all compute in the same order."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

WIDTH, WORDS, NUM_LAYERS, NUM_EXPERTS = 8, 11, 2, 4
ALL_LAYERS, ALL_EXPERTS = range(NUM_LAYERS), range(NUM_EXPERTS)


def owner_of(expert: int, num_ranks: int) -> int:
    """Return the rank that experts are dealt to: the first ones to the first rank."""
    return expert * num_ranks // NUM_EXPERTS


def _from_owners(mine: Sequence[torch.Tensor | None], like: torch.Tensor) -> list[torch.Tensor]:
    """Return every expert's tensor, each from the rank that has the expert."""
    if all(one is not None for one in mine):
        return [one for one in mine if one is not None]
    found = [torch.empty_like(like) if one is None else one.contiguous() for one in mine]
    for expert, tensor in enumerate(found):
        dist.broadcast(tensor, src=owner_of(expert, dist.get_world_size()))
    return found


class _Spread(torch.autograd.Function):
    """Gives experts their input; on the way back, adds the gradients up by the experts' numbers."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, experts: Sequence[int]) -> tuple[torch.Tensor, ...]:
        context.experts = experts
        return tuple(hidden.clone() for _ in experts)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        mine = dict(zip(context.experts, gradients, strict=True))
        first, *others = _from_owners([mine.get(one) for one in ALL_EXPERTS], gradients[0])
        total = first.clone()
        for other in others:
            total += other
        return total, None


class _Collect(torch.autograd.Function):
    """Gives every rank what all experts say; on the way back, each expert its gradient."""

    @staticmethod
    def forward(context: Any, experts: Sequence[int], *said: torch.Tensor) -> tuple[torch.Tensor, ...]:
        context.experts = experts
        mine = dict(zip(experts, said, strict=True))
        return tuple(one.clone() for one in _from_owners([mine.get(one) for one in ALL_EXPERTS], said[0]))

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return None, *(gradients[one] for one in context.experts)


class Layer(nn.Module):
    """A perceptron, and a mixture of those experts that this rank has."""

    def __init__(self, experts: Iterable[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)
        self.router = nn.Linear(WIDTH, NUM_EXPERTS)
        self.experts = nn.ModuleDict({str(one): nn.Linear(WIDTH, WIDTH) for one in experts})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normal = self.norm(hidden)
        hidden = hidden + self.down(self.up(normal).tanh())
        here = [int(one) for one in self.experts]
        inputs = _Spread.apply(normal, here)
        said = [expert(one) for expert, one in zip(self.experts.values(), inputs, strict=True)]
        chosen = self.router(normal).softmax(-1)
        for expert, one in enumerate(_Collect.apply(here, *said)):
            hidden = hidden + chosen[..., expert : expert + 1] * one
        return hidden


class Net(nn.Module):
    """The whole model, or one stage of it: names are those of the whole."""

    def __init__(self, layers: Sequence[int] = ALL_LAYERS, experts: Iterable[int] = ALL_EXPERTS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH) if 0 in layers else None
        self.layers = nn.ModuleDict({str(one): Layer(experts) for one in layers})
        self.head = nn.Linear(WIDTH, WORDS, bias=False) if NUM_LAYERS - 1 in layers else None

    def forward(self, given: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Take words, or what the stage before said; the mask is the first stage's dropout."""
        hidden = given if self.embed is None else self.embed(given) * mask
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden if self.head is None else self.head(hidden)


def loss_of(said: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Compare what the model says with the words, turned around."""
    return nn.functional.cross_entropy(said.flatten(0, 1), words.flip(0).flatten())


def through_stages(stage: nn.Module, batch: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Send parts of a batch through two stages, and their gradients back in the same order."""
    total = torch.zeros(())
    if dist.get_rank() == 0:
        said = [stage(words, mask) for words, mask in batch]
        for one in said:
            dist.send(one.detach().contiguous(), 1)
        for one in said:
            gradient = torch.empty_like(one)
            dist.recv(gradient, 1)
            one.backward(gradient)
    else:
        given = [torch.empty_like(mask) for _, mask in batch]
        for one in given:
            dist.recv(one, 0)
        for one, (words, mask) in zip(given, batch, strict=True):
            loss = loss_of(stage(one.requires_grad_(), mask), words) / len(batch)
            loss.backward()
            assert one.grad is not None
            dist.send(one.grad, 0)
            total += loss.detach()
    dist.broadcast(total, 1)
    return total.item()
