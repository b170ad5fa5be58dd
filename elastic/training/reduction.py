"""Adds the virtual ranks' gradients up over the world: in one fixed order ("bitwise"), or in any ("fast").

A leaf is one virtual rank's gradient. `fold` adds a rank's own leaves, `reduce` everybody's; the result is
the mean over all virtual ranks, bound to the parameters, the same bits on every rank. After a failed
collective nothing of it can be used.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from elastic.training.gradients import GradientRows
from elastic.training.ports import World
from elastic.training.tree import Node, grow, leaves_of, partial_sums, slice_length

Compute = Callable[[int], Tensor]
"""Runs forward and backward of a virtual rank, adding to the bound gradients, and returns its loss."""

ALIGNED_BYTES = 64

Dealt = Sequence[Sequence[int]]
"""`dealt[rank]` are the virtual ranks of each rank, in order."""


class Reduction(Protocol):
    """The way to the mean gradient. What a rank has computed of it may survive a broken world."""

    def held(self) -> list[int]:
        """List the leaves whose gradients are held since the last `forget`, also after a failed reduction."""

    def forget(self) -> None:
        """Give up what is held: the parameters have changed."""

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:
        """Compute those leaves of this rank that are not held yet, add everybody's up, bind the mean gradient
        and return the mean loss.
        """

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down to this Euclidean norm if it is longer; return what it was."""


class TreeReduction:
    """Sums in the order of a fixed binary tree over the virtual ranks: the bits do not depend on the world.

    Each rank combines one slice of everybody's partial sums, then the slices are gathered. Costs an
    all-reduce's bytes where the dealing follows the tree, and up to 2 log2 V times the exchange where it
    does not.
    """

    def __init__(self, rows: GradientRows) -> None:
        self._rows = rows
        self._sums: dict[Node, Tensor] = {}
        self._result: Tensor | None = None
        self._inbox = torch.empty(0)

    def fold(self, leaves: Sequence[int], compute: Compute) -> None:
        """Compute the leaves one by one, adding up subtrees as soon as they are whole."""
        self._keep_within(set(leaves))
        held = set(self.held())
        for leaf in leaves:
            if leaf in held:
                continue
            row = self._rows.take().zero_()
            self._rows.bind(row)
            try:
                self._rows.losses(row)[leaf] = compute(leaf)
            except BaseException:
                self._rows.give_back(row)
                raise
            grow(self._sums, Node(0, leaf), row, self._rows.virtual_ranks, self._add)

    def held(self) -> list[int]:
        """List the leaves of the subtrees that are held."""
        return sorted(leaf for node in self._sums for leaf in leaves_of(node, self._rows.virtual_ranks))

    def forget(self) -> None:
        """Give up all subtrees, and the result."""
        self._keep_within(set())
        self._drop_result()

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:
        """Swap slices of partial sums, combine copies in tree order, gather everybody's."""
        self.fold(dealt[world.rank], compute)
        self._drop_result()
        length = slice_length(self._rows.num_elements, world.size)
        mine = _combine(self._swap(world, dealt, length), dealt, self._rows.virtual_ranks)
        mine.div_(self._rows.virtual_ranks)
        result = self._result = self._rows.take()
        if world.size == 1:
            result[:length] = mine
        else:
            world.all_gather(result[: world.size * length], mine)
        return _mean_loss(self._rows, result)

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down; every rank does the same arithmetic on the same bits."""
        return _clip(self._rows, self._result, largest_norm)

    def _swap(self, world: World, dealt: Dealt, length: int) -> list[list[Tensor]]:
        """Return our slice of every rank's partial sums: copies, so that no broken world spoils the sums."""
        nodes = [partial_sums(leaves, self._rows.virtual_ranks) for leaves in dealt]
        inbox = self._make_room(sum(map(len, nodes)), length)
        swapped = [[next(inbox) for _ in each] for each in nodes]
        mine = [self._sums[node] for node in nodes[world.rank]]
        cuts = [slice(peer * length, (peer + 1) * length) for peer in range(world.size)]
        for copy, row in zip(swapped[world.rank], mine, strict=True):
            copy.copy_(row[cuts[world.rank]])
        for index in range(max(map(len, nodes)) if world.size > 1 else 0):
            sent = mine[index] if index < len(mine) else None
            world.exchange(
                [None if sent is None or peer == world.rank else sent[cut] for peer, cut in enumerate(cuts)],
                [
                    rows[index] if index < len(rows) and peer != world.rank else None
                    for peer, rows in enumerate(swapped)
                ],
            )
        return swapped

    def _make_room(self, num_slices: int, length: int) -> Iterator[Tensor]:
        """Return memory for slices; it is kept while the world stays the same."""
        if self._inbox.shape != (num_slices, length):
            self._inbox = torch.empty(num_slices, length, device=self._rows.device)
        return iter(self._inbox)

    def _keep_within(self, leaves: set[int]) -> None:
        """Give up the subtrees that reach beyond some leaves: others compute those."""
        for node in list(self._sums):
            if not leaves.issuperset(leaves_of(node, self._rows.virtual_ranks)):
                self._rows.give_back(self._sums.pop(node))

    def _drop_result(self) -> None:
        if self._result is not None:
            self._rows.give_back(self._result)
            self._result = None

    def _add(self, left: Tensor, right: Tensor) -> None:
        left.add_(right)
        self._rows.give_back(right)


class PlainReduction:
    """Sums in whatever order is fastest: exact in batch, scale, data and randomness, not in the last bits."""

    def __init__(self, rows: GradientRows) -> None:
        self._rows = rows
        self._row = rows.take()
        self._held: list[int] = []

    def fold(self, leaves: Sequence[int], compute: Compute) -> None:
        """Let backward add all leaves to one row."""
        if not set(self._held) <= set(leaves):
            self._held = []
        if not self._held:
            self._row.zero_()
        self._rows.bind(self._row)
        for leaf in leaves:
            if leaf not in self._held:
                self._rows.losses(self._row)[leaf] = compute(leaf)
                self._held.append(leaf)

    def held(self) -> list[int]:
        """List the leaves that are in the row."""
        return sorted(self._held)

    def forget(self) -> None:
        """Give up the row's content."""
        self._held = []

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:
        """Add the rows up with the library's all-reduce; what a broken one leaves is worthless."""
        self.fold(dealt[world.rank], compute)
        self._held = []
        if world.size > 1:
            world.all_reduce(self._row, "sum")
        self._row.div_(self._rows.virtual_ranks)
        return _mean_loss(self._rows, self._row)

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down."""
        return _clip(self._rows, self._row, largest_norm)


def _combine(swapped: Sequence[Sequence[Tensor]], dealt: Dealt, num_leaves: int) -> Tensor:
    """Add the slices of all ranks' partial sums in the tree's order, in place; return the root's."""
    forest: dict[Node, Tensor] = {}
    for slices, leaves in zip(swapped, dealt, strict=True):
        for node, one in zip(partial_sums(leaves, num_leaves), slices, strict=True):
            grow(forest, node, one, num_leaves, _add)
    (root,) = forest.values()
    return root


def _add(left: Tensor, right: Tensor) -> None:
    left.add_(right)


def _mean_loss(rows: GradientRows, reduced: Tensor) -> float:
    """Bind the reduced gradient; return the mean of the losses, which are already divided by their number."""
    rows.bind(reduced)
    return float(rows.losses(reduced).double().sum())


def norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together: the same bits however they lie in memory."""
    norms = torch.stack([torch.linalg.vector_norm(_aligned(gradient.flatten())) for gradient in gradients])
    return norms.double().square().sum().sqrt().float()


def _aligned(gradient: Tensor) -> Tensor:
    """Return a copy where a device's kernel would add in another order for the place in memory."""
    is_aligned = gradient.device.type == "cpu" or gradient.data_ptr() % ALIGNED_BYTES == 0
    return gradient if is_aligned else gradient.clone()


def _clip(rows: GradientRows, reduced: Tensor | None, largest_norm: float) -> float:
    if reduced is None:
        raise RuntimeError("there is no reduced gradient to clip")
    norm = norm_of(rows.gradients(reduced))
    if largest_norm < inf:
        rows.gradient(reduced).mul_((largest_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
