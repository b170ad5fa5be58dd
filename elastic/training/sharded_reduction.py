"""Adds sharded gradients up in the canonical tree's order: the replicated run's bits, a shard on each rank.

A step is a number of turns: in each, every rank computes one virtual rank's gradient, and the units of all
ranks' models meet in forward and backward. Where the turns leave a rank nothing to do, it computes a virtual
rank that another one computes as well, and gives nothing.
"""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from elastic.errors import JobRejected
from elastic.training.fully_sharded import FullyShardedLearner
from elastic.training.holdings import local_rows
from elastic.training.lockstep import COLLECT, END
from elastic.training.ports import World
from elastic.training.reduction import Compute, Dealt, norm_of
from elastic.training.strides import laid_beside
from elastic.training.through_layers import only_through_layers
from elastic.training.tree import Node, grow
from elastic.training.units import WHOLE


class ShardedReduction:
    """Each rank sums up its own shard of the gradients, and no other."""

    def __init__(self, learner: FullyShardedLearner, virtual_ranks: int) -> None:
        self._learner, self._virtual_ranks = learner, virtual_ranks
        self._sums: dict[int, dict[Node, Tensor]] = {}
        self._turn: Sequence[int] = ()
        self._collected: set[int] = set()
        self._norm = torch.zeros(())
        learner.collect = self._collect

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:  # noqa: ARG002  (dealt by turns)
        """Compute turn by turn, bind the mean gradient of the rows that are here, return the mean loss."""
        self.forget()
        losses = torch.zeros(self._virtual_ranks)
        for first in range(0, self._virtual_ranks, world.size):
            self._turn = range(first, min(first + world.size, self._virtual_ranks))
            self._collected.clear()
            leaf = first + world.rank
            with only_through_layers(self._learner.live.sharded.parameters):
                loss = compute(leaf if leaf in self._turn else first)
            if leaf in self._turn:
                losses[leaf] = loss
            self._collect_whole()
            self._learner.live.lockstep.come_to(world, END)
            self._unbind()
        world.all_reduce(losses, "sum")  # each one with zeros: exact
        self._bind()
        return float(losses.div_(self._virtual_ranks).double().sum())

    def held(self) -> list[int]:
        """List nothing: in another world the shards are other ones."""
        return []

    def forget(self) -> None:
        """Give up all sums, and the result."""
        self._sums.clear()
        self._unbind()

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down, by the norm of all shards."""
        if largest_norm < inf:
            factor = (largest_norm / (self._norm + 1e-6)).clamp(max=1.0)
            for parameter in self._learner.live.sharded.parameters.values():
                if parameter.grad is not None:
                    local_rows(parameter.grad).mul_(factor)
        return float(self._norm)

    def _collect(self, unit: int, gradients: Tensor) -> None:
        """Take a unit's gradients, one row for each shard: give each holder its own, and add up ours."""
        world, cuts = self._learner.live.world, self._learner.live.cuts
        if unit in self._collected:
            raise JobRejected(
                "the model calls a layer more than once in a forward, which cannot be sharded: set "
                "training.parameter_copies = 0"
            )
        self._collected.add(unit)
        self._learner.live.lockstep.come_to(world, COLLECT, unit)
        parts = [gradients[0 if unit == WHOLE else cut.index] for cut in cuts]
        is_giving = world.rank < len(self._turn)
        slices = [torch.empty_like(parts[0]) for _ in self._turn]
        if is_giving:
            slices[world.rank].copy_(parts[world.rank])
        peers = [rank if rank != world.rank else None for rank in range(world.size)]
        self._learner.exchange(
            [parts[peer] if is_giving and peer is not None else None for peer in peers],
            [slices[peer] if peer is not None and peer < len(slices) else None for peer in peers],
        )
        forest = self._sums.setdefault(unit, {})
        for leaf, each in zip(self._turn, slices, strict=True):
            each.add_(0.0)  # as a gradient that is added to zeros has no negative ones
            grow(forest, Node(0, leaf), each, self._virtual_ranks, _add)

    def _collect_whole(self) -> None:
        """Take the gradients of the parameters that are whole on every rank, which torch leaves bound."""
        sharded = self._learner.live.sharded
        parameters = [sharded.parameters[name] for name in sharded.whole]
        bound = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        if bound:
            self._collect(WHOLE, torch.cat([each.detach().flatten() for each in bound]).unsqueeze(0))

    def _bind(self) -> None:
        """Bind the mean gradients, zeros where no backward came, and learn their norm."""
        sharded = self._learner.live.sharded
        self._unbind()
        for unit, forest in self._sums.items():
            (total,) = forest.values()
            total.div_(self._virtual_ranks)
            for name, rows in sharded.split(unit, total):
                parameter = sharded.parameters[name]
                lying = laid_beside(parameter, rows) if unit == WHOLE else rows
                parameter.grad = sharded.spread(name, lying)
        for name, parameter in sharded.parameters.items():
            if parameter.requires_grad and parameter.grad is None:
                rows = torch.zeros_like(local_rows(parameter))
                parameter.grad = sharded.spread(name, rows)
        self._norm = norm_of(
            self._learner.whole(name, parameter.grad)
            for name, parameter in sharded.parameters.items()
            if parameter.grad is not None
        )

    def _unbind(self) -> None:
        for parameter in self._learner.trained:
            parameter.grad = None


def _add(left: Tensor, right: Tensor) -> None:
    left.add_(right)
