"""The sum over virtual ranks: one tree, hence one result to the last bit, whoever holds which leaves."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.control.dealing import deal
from elastic.training.gradients import GradientRows
from elastic.training.reduction import PlainReduction, TreeReduction
from elastic.training.tree import Node, partial_sums, place

SHAPES = [(3, 5), (7,), (1, 1), (4, 2, 2)]


class ThreadWorld:
    """A world whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, board: dict[Any, Any], barrier: threading.Barrier) -> None:
        self.generation, self.rank, self.size, self.hosts = 1, rank, size, ("here",) * size
        self._board, self._barrier = board, barrier

    def exchange(self, send: Sequence[Tensor | None], receive: Sequence[Tensor | None]) -> None:
        self._post({(self.rank, peer): tensor for peer, tensor in enumerate(send) if tensor is not None})
        for peer, tensor in enumerate(receive):
            if tensor is not None:
                tensor.copy_(self._board.pop((peer, self.rank)))
        self._barrier.wait()
        assert not self._board, "a tensor was sent that nobody received"
        self._barrier.wait()

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        self._post({self.rank: mine})
        out.copy_(torch.cat([self._board[rank] for rank in range(self.size)]))
        self._clear()

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        self._post({self.rank: tensor})
        total = torch.stack([self._board[rank] for rank in range(self.size)]).sum(0)
        self._clear()
        tensor.copy_(total)

    def send(self, tensor: Tensor, to: int) -> None: ...

    def receive(self, tensor: Tensor, source: int) -> None: ...

    def _post(self, sent: dict[Any, Tensor]) -> None:
        self._board.update({key: tensor.clone() for key, tensor in sent.items()})
        self._barrier.wait()

    def _clear(self) -> None:
        self._barrier.wait()
        self._board.pop(self.rank)
        self._barrier.wait()


class Parameters(nn.Module):
    """A model that is nothing but parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.zeros(shape) for shape in SHAPES)


def leaf_gradients(leaf: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(leaf)
    scale = 10.0 ** float(torch.randint(-6, 6, (), generator=rng))
    return [torch.randn(shape, generator=rng) * scale for shape in SHAPES]


def reduced(reduction_class: type, dealt: Sequence[range], num_leaves: int) -> list[tuple[float, Tensor]]:
    """Return every rank's mean loss and its gradient, flat, as the optimizer would see it."""
    board: dict[Any, Any] = {}
    barrier = threading.Barrier(len(dealt), timeout=20)

    def one_rank(rank: int) -> tuple[float, Tensor]:
        model = Parameters()
        reduction = reduction_class(GradientRows(model, num_leaves))

        def compute(leaf: int) -> Tensor:
            for parameter, gradient in zip(model.all, leaf_gradients(leaf), strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(gradient)
            return torch.tensor(1.5 * leaf)

        loss = 0.0
        for _ in range(2):  # the second time over memory that is dirty from the first
            reduction.fold(dealt[rank], compute)
            loss = reduction.reduce(ThreadWorld(rank, len(dealt), board, barrier), dealt)
        return loss, torch.cat([parameter.grad.flatten() for parameter in model.all])

    with ThreadPoolExecutor(len(dealt)) as pool:
        return list(pool.map(one_rank, range(len(dealt))))


def tree_sum(leaves: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Add up the aligned subtree over [start, stop) the plain, recursive way."""
    middle = start + (stop - start) // 2
    if stop - start == 1:
        return leaves[start]
    left = tree_sum(leaves, start, middle)
    return left + tree_sum(leaves, middle, stop) if middle < len(leaves) else left


@st.composite
def dealings(draw: st.DrawFn) -> tuple[int, list[range]]:
    num_leaves = draw(st.integers(1, 19))
    size = draw(st.integers(1, min(5, num_leaves)))
    inner = (
        draw(st.sets(st.integers(1, num_leaves - 1), min_size=size - 1, max_size=size - 1))
        if size > 1
        else set()
    )
    return num_leaves, [range(*cut) for cut in pairwise([0, *sorted(inner), num_leaves])]


@settings(max_examples=60)
@given(dealings())
def test_every_dealing_gives_every_rank_the_bits_of_the_recursive_tree(dealing):
    num_leaves, dealt = dealing
    leaves = [torch.cat([each.flatten() for each in leaf_gradients(leaf)]) for leaf in range(num_leaves)]
    top = 1 << (num_leaves - 1).bit_length()
    expected = tree_sum(leaves, 0, top) / num_leaves
    for loss, gradient in reduced(TreeReduction, dealt, num_leaves):
        assert gradient.numpy().tobytes() == expected.numpy().tobytes()
        assert loss == reduced(TreeReduction, [range(num_leaves)], num_leaves)[0][0]


def test_worlds_of_one_to_five_agree_bit_for_bit_at_eight_virtual_ranks():
    results = {
        (loss, gradient.numpy().tobytes())
        for size in range(1, 6)
        for loss, gradient in reduced(TreeReduction, deal(8, size), 8)
    }
    assert len(results) == 1


def test_the_plain_reduction_gives_the_same_mean_but_for_rounding():
    ((loss, tree),) = reduced(TreeReduction, deal(8, 1), 8)
    for plain_loss, plain in reduced(PlainReduction, deal(8, 3), 8):
        assert plain_loss == loss
        torch.testing.assert_close(plain, tree, rtol=1e-4, atol=1e-4 * float(tree.abs().max()))


@given(st.integers(1, 300), st.data())
def test_a_rank_sums_its_leaves_into_few_subtrees_that_cover_them_exactly(num_leaves, data):
    start = data.draw(st.integers(0, num_leaves - 1))
    stop = data.draw(st.integers(start + 1, num_leaves))
    sums = partial_sums(range(start, stop), num_leaves)
    covered = [leaf for level, k in sums for leaf in range(k << level, min((k + 1) << level, num_leaves))]
    assert covered == list(range(start, stop))
    assert len(sums) <= max(1, 2 * (num_leaves - 1).bit_length())


@given(st.integers(1, 300))
def test_all_leaves_join_into_one_root_with_one_addition_less_than_leaves(num_leaves):
    nodes: list[Node] = []
    additions = sum(place(nodes, Node(0, leaf), num_leaves) for leaf in range(num_leaves))
    assert len(nodes) == 1
    assert additions == num_leaves - 1
