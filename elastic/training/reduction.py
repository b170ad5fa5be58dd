"""Adds the virtual ranks' gradients up over the world: in one fixed order ("bitwise"), or in any ("fast").

A leaf is one virtual rank's gradient. The result is the mean over all virtual ranks, bound to the
parameters, the same bits on every rank. The sum overlaps with the backward of each rank's last leaf: what
that has completed of the gradients, bucket by bucket, is on its way already.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from elastic.training.buckets import Buckets, Cut
from elastic.training.gradients import GradientRows
from elastic.training.ports import World
from elastic.training.tree import Node, grow, joins, leaves_of, partial_sums

Compute = Callable[[int], Tensor]
"""Runs forward and backward of a virtual rank, adding to the bound gradients, and returns its loss."""

ALIGNED_BYTES = 64

Dealt = Sequence[Sequence[int]]
"""`dealt[rank]` are the virtual ranks of each rank, in order."""


class Reduction(Protocol):
    """The way to the mean gradient. What a rank has computed of it survives a broken world."""

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:
        """Compute those leaves of this rank that are not held yet, add everybody's up, bind the mean
        gradient, and return the mean loss.

        After a failure the world has to be left before the next call: it may still use what is held.
        """

    def held(self) -> list[int]:
        """List the leaves whose gradients are held since the last `forget`, also after a failed reduction."""

    def forget(self) -> None:
        """Give up what is held: the parameters have changed."""

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down to this Euclidean norm if it is longer; return what it was."""


class TreeReduction:
    """Sums in the order of a fixed binary tree over the virtual ranks: the bits do not depend on the world.

    Of each bucket, each rank combines one slice of everybody's partial sums, then the slices are gathered.
    Costs an all-reduce's bytes where the dealing follows the tree, and up to 2 log2 V times the exchange
    where it does not.
    """

    def __init__(self, rows: GradientRows, bucket_mib: float) -> None:
        self._rows = rows
        self._buckets = Buckets(rows, bucket_mib)
        self._sums: dict[Node, Tensor] = {}
        self._result: Tensor | None = None
        self._inbox = torch.empty(0, device=rows.device)

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:
        """Add up subtrees as soon as they are whole; what the last leaf completes is on its way at once."""
        self._keep_within(set(dealt[world.rank]))
        self._drop_result()
        nodes = [partial_sums(leaves, self._rows.virtual_ranks) for leaves in dealt]
        cut = self._buckets.cut(world.size)
        self._make_room(sum(map(len, nodes)) * max(map(_length, cut.buckets)) // world.size)
        result = self._result = self._rows.take()

        def start(sums: Mapping[Node, Tensor], bucket: slice) -> None:
            mine = [sums[node][bucket] for node in nodes[world.rank]]
            world.beside(partial(self._reduce_bucket, world, nodes, mine, result[bucket]))

        held = set(self.held())
        left = [leaf for leaf in dealt[world.rank] if leaf not in held]
        for leaf in left[:-1]:
            self._fold(leaf, compute, self._buckets.whole, _start_nothing)
        if left:
            self._fold(left[-1], compute, cut, start)
        else:
            for bucket in cut.buckets:
                start(self._sums, bucket)
        world.join()
        return _mean_loss(self._rows, result)

    def held(self) -> list[int]:
        """List the leaves of the subtrees that are held."""
        return sorted(leaf for node in self._sums for leaf in leaves_of(node, self._rows.virtual_ranks))

    def forget(self) -> None:
        """Give up all subtrees, and the result."""
        self._keep_within(set())
        self._drop_result()

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down; every rank does the same arithmetic on the same bits."""
        return _clip(self._rows, self._result, largest_norm)

    def _fold(
        self,
        leaf: int,
        compute: Compute,
        cut: Cut,
        start: Callable[[Mapping[Node, Tensor], slice], None],
    ) -> None:
        """Compute a leaf and join it to its siblings, bucket by bucket; they stay as they are until it is
        whole, so that one that fails spoils nothing.
        """
        siblings, node = joins(self._sums, Node(0, leaf), self._rows.virtual_ranks)
        row = self._rows.take().zero_()
        self._rows.bind(row)

        def join(bucket: slice) -> None:
            for sibling in siblings:
                row[bucket].add_(self._sums[sibling][bucket])
            start({**self._sums, node: row}, bucket)

        try:
            with self._buckets.watch(cut, join):
                self._rows.losses(row)[leaf] = compute(leaf)
                self._rows.check_bound()
        except BaseException:
            self._rows.give_back(row)
            raise
        for sibling in siblings:
            self._rows.give_back(self._sums.pop(sibling))
        self._sums[node] = row

    def _reduce_bucket(
        self, world: World, nodes: Sequence[Sequence[Node]], mine: Sequence[Tensor], result: Tensor
    ) -> None:
        """Swap slices of partial sums, combine copies in tree order, gather everybody's."""
        swapped = self._swap(world, nodes, mine, len(result) // world.size)
        combined = _combine(swapped, nodes, self._rows.virtual_ranks)
        combined.div_(self._rows.virtual_ranks)
        if world.size == 1:
            result.copy_(combined)
        else:
            world.all_gather(result, combined)

    def _swap(
        self, world: World, nodes: Sequence[Sequence[Node]], mine: Sequence[Tensor], length: int
    ) -> list[list[Tensor]]:
        """Return our slice of every rank's partial sums: copies, so that no broken world spoils the sums."""
        inbox = iter(self._inbox[: sum(map(len, nodes)) * length].view(-1, length))
        swapped = [[next(inbox) for _ in each] for each in nodes]
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

    def _make_room(self, num_elements: int) -> None:
        """Have memory for the slices of one bucket; they are reduced one after another."""
        if len(self._inbox) < num_elements:
            self._inbox = torch.empty(num_elements, device=self._rows.device)

    def _keep_within(self, leaves: set[int]) -> None:
        """Give up the subtrees that reach beyond some leaves: others compute those."""
        for node in list(self._sums):
            if not leaves.issuperset(leaves_of(node, self._rows.virtual_ranks)):
                self._rows.give_back(self._sums.pop(node))

    def _drop_result(self) -> None:
        if self._result is not None:
            self._rows.give_back(self._result)
            self._result = None


class PlainReduction:
    """Sums in whatever order is fastest: exact in batch, scale, data and randomness, not in the last bits."""

    def __init__(self, rows: GradientRows, bucket_mib: float) -> None:
        self._rows = rows
        self._buckets = Buckets(rows, bucket_mib)
        self._row = rows.take()
        self._held: list[int] = []

    def reduce(self, world: World, dealt: Dealt, compute: Compute) -> float:
        """Let backward add all leaves to one row, and the library's all-reduce add up the rows."""
        if not set(self._held) <= set(dealt[world.rank]):
            self._held = []
        if not self._held:
            self._row.zero_()
        self._rows.bind(self._row)
        left = [leaf for leaf in dealt[world.rank] if leaf not in self._held]
        for leaf in left[:-1]:
            self._fold(leaf, compute, self._buckets.whole, _start_nothing)
            self._held.append(leaf)
        cut, start = self._buckets.cut(world.size), partial(self._start, world)
        if left:
            self._fold(left[-1], compute, cut, start)
        else:
            for bucket in cut.buckets:
                start(bucket)
        world.join()
        return _mean_loss(self._rows, self._row)

    def held(self) -> list[int]:
        """List the leaves that are in the row."""
        return sorted(self._held)

    def forget(self) -> None:
        """Give up the row's content."""
        self._held = []

    def clip(self, largest_norm: float) -> float:
        """Scale the reduced gradient down."""
        return _clip(self._rows, self._row, largest_norm)

    def _fold(self, leaf: int, compute: Compute, cut: Cut, start: Callable[[slice], None]) -> None:
        with self._buckets.watch(cut, start):
            self._rows.losses(self._row)[leaf] = compute(leaf)
            self._rows.check_bound()

    def _start(self, world: World, bucket: slice) -> None:
        self._held = []  # what a broken all-reduce leaves is worthless
        world.beside(partial(self._reduce_bucket, world, self._row[bucket]))

    def _reduce_bucket(self, world: World, bucket: Tensor) -> None:
        if world.size > 1:
            world.all_reduce(bucket, "sum")
        bucket.div_(self._rows.virtual_ranks)


REDUCTIONS: Mapping[str, Callable[[GradientRows, float], Reduction]] = {
    "bitwise": TreeReduction,
    "fast": PlainReduction,
}
"""Of each determinism."""


def norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together: the same bits however they lie in memory."""
    norms = torch.stack([torch.linalg.vector_norm(_aligned(gradient.flatten())) for gradient in gradients])
    return norms.double().square().sum().sqrt().float()


def _aligned(gradient: Tensor) -> Tensor:
    """Return a copy where a device's kernel would add in another order for the place in memory."""
    is_aligned = gradient.device.type == "cpu" or gradient.data_ptr() % ALIGNED_BYTES == 0
    return gradient if is_aligned else gradient.clone()


def _start_nothing(*_: object) -> None:
    """Other leaves of this rank follow: nothing is complete yet."""


def _length(bucket: slice) -> int:
    return int(bucket.stop - bucket.start)


def _combine(swapped: Sequence[Sequence[Tensor]], nodes: Sequence[Sequence[Node]], num_leaves: int) -> Tensor:
    """Add the slices of all ranks' partial sums in the tree's order, in place; return the root's."""
    forest: dict[Node, Tensor] = {}
    for slices, theirs in zip(swapped, nodes, strict=True):
        for node, one in zip(theirs, slices, strict=True):
            grow(forest, node, one, num_leaves, _add)
    (root,) = forest.values()
    return root


def _add(left: Tensor, right: Tensor) -> None:
    left.add_(right)


def _mean_loss(rows: GradientRows, reduced: Tensor) -> float:
    """Bind the reduced gradient; return the mean of the losses, which are already divided by their number."""
    rows.bind(reduced)
    return float(rows.losses(reduced).double().sum())


def _clip(rows: GradientRows, reduced: Tensor | None, largest_norm: float) -> float:
    if reduced is None:
        raise RuntimeError("there is no reduced gradient to clip")
    norm = norm_of(rows.views(reduced))
    if largest_norm < inf:
        rows.gradient(reduced).mul_((largest_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
