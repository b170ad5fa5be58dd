"""Adds the virtual ranks' gradients up over the world: in one fixed order ("bitwise"), or in any ("fast").

A leaf is one virtual rank's gradient. `fold` adds a rank's own leaves, `reduce` everybody's; the result is
the mean over all virtual ranks, bound to the parameters, the same bits on every rank. After a failed
collective nothing of it can be used.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from elastic.training.gradients import GradientRows
from elastic.training.ports import World
from elastic.training.tree import Node, partial_sums, place, slice_length

Compute = Callable[[int], Tensor]
"""Runs forward and backward of a virtual rank, adding to the bound gradients, and returns its loss."""


class Reduction(Protocol):
    """Two steps to the mean gradient. `dealt[rank]` are the virtual ranks of each rank."""

    def fold(self, leaves: range, compute: Compute) -> None:
        """Compute this rank's leaves and add them up as far as that goes alone."""

    def reduce(self, world: World, dealt: Sequence[range]) -> float:
        """Add everybody's up, bind the mean gradient, and return the mean loss."""

    def clip(self, largest_norm: float) -> None:
        """Scale the reduced gradient down to this Euclidean norm if it is longer."""


class TreeReduction:
    """Sums in the order of a fixed binary tree over the virtual ranks: the bits do not depend on the world.

    Each rank combines one slice of everybody's partial sums, then the slices are gathered. Costs an
    all-reduce's bytes where the dealing follows the tree, and up to 2 log2 V times the exchange where it
    does not.
    """

    def __init__(self, rows: GradientRows) -> None:
        self._rows = rows
        self._sums: list[Tensor] = []
        self._result: Tensor | None = None
        self._inbox = torch.empty(0)

    def fold(self, leaves: range, compute: Compute) -> None:
        """Compute the leaves one by one, adding up subtrees as soon as they are whole."""
        self._forget()
        nodes: list[Node] = []
        for leaf in leaves:
            row = self._rows.take().zero_()
            self._sums.append(row)
            self._rows.bind(row)
            self._rows.losses(row)[leaf] = compute(leaf)
            for _ in range(place(nodes, Node(0, leaf), self._rows.virtual_ranks)):
                right = self._sums.pop()
                self._sums[-1].add_(right)
                self._rows.give_back(right)

    def reduce(self, world: World, dealt: Sequence[range]) -> float:
        """Swap slices of partial sums, combine ours in tree order, gather everybody's."""
        length = slice_length(self._rows.num_elements, world.size)
        mine = _combine(self._swap(world, dealt, length), dealt, self._rows.virtual_ranks)
        mine.div_(self._rows.virtual_ranks)
        if world.size == 1:
            self._result = self._sums.pop()
        else:
            self._result = self._rows.take()
            world.all_gather(self._result[: world.size * length], mine)
        return _mean_loss(self._rows, self._result)

    def clip(self, largest_norm: float) -> None:
        """Scale the reduced gradient down; every rank does the same arithmetic on the same bits."""
        _clip(self._rows, self._result, largest_norm)

    def _swap(self, world: World, dealt: Sequence[range], length: int) -> list[list[Tensor]]:
        """Return our slice of every rank's partial sums, by rank."""
        counts = [len(partial_sums(leaves, self._rows.virtual_ranks)) for leaves in dealt]
        inbox = self._make_room(sum(counts) - counts[world.rank], length)
        cuts = [slice(peer * length, (peer + 1) * length) for peer in range(world.size)]
        swapped = [
            [next(inbox) for _ in range(count)] if rank != world.rank else []
            for rank, count in enumerate(counts)
        ]
        for index in range(max(counts) if world.size > 1 else 0):
            send: list[Tensor | None] = [None] * world.size
            if index < len(self._sums):
                send = [
                    self._sums[index][cut] if peer != world.rank else None for peer, cut in enumerate(cuts)
                ]
            world.exchange(send, [sums[index] if index < len(sums) else None for sums in swapped])
        swapped[world.rank] = [row[cuts[world.rank]] for row in self._sums]
        return swapped

    def _make_room(self, num_slices: int, length: int) -> Iterator[Tensor]:
        """Return memory for received slices; it is kept while the world stays the same."""
        if self._inbox.shape != (num_slices, length):
            self._inbox = torch.empty(num_slices, length, device=self._rows.device)
        return iter(self._inbox)

    def _forget(self) -> None:
        for row in [*self._sums, *([] if self._result is None else [self._result])]:
            self._rows.give_back(row)
        self._sums, self._result = [], None


class PlainReduction:
    """Sums in whatever order is fastest: exact in batch, scale, data and randomness, not in the last bits."""

    def __init__(self, rows: GradientRows) -> None:
        self._rows = rows
        self._row = rows.take()

    def fold(self, leaves: range, compute: Compute) -> None:
        """Let backward add all leaves to one row."""
        self._row.zero_()
        self._rows.bind(self._row)
        for leaf in leaves:
            self._rows.losses(self._row)[leaf] = compute(leaf)

    def reduce(self, world: World, dealt: Sequence[range]) -> float:  # noqa: ARG002  (the dealing does not matter here)
        """Add the rows up with the library's all-reduce."""
        if world.size > 1:
            world.all_reduce(self._row, "sum")
        self._row.div_(self._rows.virtual_ranks)
        return _mean_loss(self._rows, self._row)

    def clip(self, largest_norm: float) -> None:
        """Scale the reduced gradient down."""
        _clip(self._rows, self._row, largest_norm)


def _combine(swapped: Sequence[Sequence[Tensor]], dealt: Sequence[range], num_leaves: int) -> Tensor:
    """Add the slices of all ranks' partial sums in the tree's order, in place; return the root's."""
    nodes: list[Node] = []
    sums: list[Tensor] = []
    for slices, leaves in zip(swapped, dealt, strict=True):
        for node, one in zip(partial_sums(leaves, num_leaves), slices, strict=True):
            sums.append(one)
            for _ in range(place(nodes, node, num_leaves)):
                right = sums.pop()
                sums[-1].add_(right)
    (root,) = sums
    return root


def _mean_loss(rows: GradientRows, reduced: Tensor) -> float:
    """Bind the reduced gradient; return the mean of the losses, which are already divided by their number."""
    rows.bind(reduced)
    return float(rows.losses(reduced).double().sum())


def _clip(rows: GradientRows, reduced: Tensor | None, largest_norm: float) -> None:
    if reduced is None:
        raise RuntimeError("there is no reduced gradient to clip")
    gradient = rows.gradient(reduced)
    scale = (largest_norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
    gradient.mul_(scale)
