"""The sum over virtual ranks: one tree, hence one result to the last bit, whoever holds which leaves."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.control.dealing import deal, deal_rest
from elastic.runtime.lane import ThreadLane
from elastic.training.gradients import GradientRows
from elastic.training.ports import Broken
from elastic.training.reduction import PlainReduction, TreeReduction
from elastic.training.tree import Node, grow, leaves_of, partial_sums

SHAPES = [(3, 5), (70,), (1, 1), (4, 20, 2)]
BUCKETS_MIB = st.sampled_from([0.0, 1e-9, 256 / 2**20, 1.0])
"""No overlap, the smallest there can be, some, and one."""


class ThreadWorld:
    """A world whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, board: dict[Any, Any], barrier: threading.Barrier) -> None:
        self.generation, self.rank, self.size, self.hosts = 1, rank, size, ("here",) * size
        self._board, self._barrier = board, barrier
        self._lane = ThreadLane()

    def beside(self, work: Callable[[], None]) -> None:
        self._lane.start(work)

    def join(self) -> None:
        self._lane.join()

    def leave(self) -> None:
        self._lane.close()

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
        everyones = torch.stack([self._board[rank] for rank in range(self.size)])
        total = everyones.sum(0) if op == "sum" else everyones.amax(0)
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


def even(num_leaves: int, size: int) -> tuple[tuple[int, ...], ...]:
    return deal(num_leaves, (0.0,) * size)


def backward(model: Parameters, leaf: int) -> Tensor:
    """Give every parameter its gradient of a leaf, as the backward of a loss does; return the loss."""
    gradients = zip(model.all, leaf_gradients(leaf), strict=True)
    sum((parameter * gradient).sum() for parameter, gradient in gradients).backward()
    return torch.tensor(1.5 * leaf)


def reduced(
    reduction_class: type, dealt: Sequence[Sequence[int]], num_leaves: int, bucket_mib: float = 0.0
) -> list[tuple[float, Tensor]]:
    """Return every rank's mean loss and its gradient, flat, as the optimizer would see it."""
    board: dict[Any, Any] = {}
    barrier = threading.Barrier(len(dealt), timeout=5)

    def one_rank(rank: int) -> tuple[float, Tensor]:
        model = Parameters()
        reduction = reduction_class(GradientRows(model, num_leaves), bucket_mib)
        world, loss = ThreadWorld(rank, len(dealt), board, barrier), 0.0
        for _ in range(2):  # the second time over memory that is dirty from the first, and overlapping
            reduction.forget()
            loss = reduction.reduce(world, dealt, partial(backward, model))
        world.leave()
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
def dealings(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    num_leaves = draw(st.integers(1, 19))
    size = draw(st.integers(1, min(5, num_leaves)))
    hands = draw(st.lists(st.integers(0, size - 1), min_size=num_leaves, max_size=num_leaves))
    return num_leaves, [[leaf for leaf in range(num_leaves) if hands[leaf] == rank] for rank in range(size)]


@settings(max_examples=60)
@given(dealings(), BUCKETS_MIB)
def test_every_dealing_in_any_buckets_gives_every_rank_the_bits_of_the_recursive_tree(dealing, bucket_mib):
    num_leaves, dealt = dealing
    leaves = [torch.cat([each.flatten() for each in leaf_gradients(leaf)]) for leaf in range(num_leaves)]
    top = 1 << (num_leaves - 1).bit_length()
    expected = tree_sum(leaves, 0, top) / num_leaves
    for loss, gradient in reduced(TreeReduction, dealt, num_leaves, bucket_mib):
        assert gradient.numpy().tobytes() == expected.numpy().tobytes()
        assert loss == reduced(TreeReduction, [range(num_leaves)], num_leaves)[0][0]


def test_worlds_of_one_to_five_agree_bit_for_bit_at_eight_virtual_ranks():
    results = {
        (loss, gradient.numpy().tobytes())
        for size in range(1, 6)
        for loss, gradient in reduced(TreeReduction, even(8, size), 8)
    }
    assert len(results) == 1


def test_the_plain_reduction_gives_the_same_mean_but_for_rounding():
    ((loss, tree),) = reduced(TreeReduction, even(8, 1), 8)
    for bucket_mib in (0.0, 256 / 2**20):
        for plain_loss, plain in reduced(PlainReduction, even(8, 3), 8, bucket_mib):
            assert plain_loss == loss
            torch.testing.assert_close(plain, tree, rtol=1e-4, atol=1e-4 * float(tree.abs().max()))


@given(st.integers(1, 300), st.data())
def test_a_rank_sums_its_leaves_into_few_subtrees_that_cover_them_exactly(num_leaves, data):
    start = data.draw(st.integers(0, num_leaves - 1))
    stop = data.draw(st.integers(start + 1, num_leaves))
    sums = partial_sums(range(start, stop), num_leaves)
    covered = [leaf for node in sums for leaf in leaves_of(node, num_leaves)]
    assert covered == list(range(start, stop))
    assert len(sums) <= max(1, 2 * (num_leaves - 1).bit_length())


@given(st.permutations(range(23)), st.integers(1, 23))
def test_leaves_that_come_in_any_order_join_into_one_root_with_one_addition_less_than_leaves(
    order, num_leaves
):
    forest: dict[Node, list[int]] = {}
    additions = []

    def add(left: list[int], right: list[int]) -> None:
        additions.append((left[:], right[:]))
        left += right

    for leaf in (each for each in order if each < num_leaves):
        grow(forest, Node(0, leaf), [leaf], num_leaves, add)
    assert list(forest.values()) == [list(range(num_leaves))]
    assert len(additions) == num_leaves - 1


class BrokenWorld(ThreadWorld):
    """A world that breaks when its members swap, or when they gather what they combined."""

    def __init__(self, rank: int, size: int, at: str) -> None:
        super().__init__(rank, size, {}, threading.Barrier(1))
        self._at = at

    def exchange(self, send: Sequence[Tensor | None], receive: Sequence[Tensor | None]) -> None:
        if self._at in ("fold", "exchange"):
            raise Broken(1, "a peer died")
        for tensor in receive:
            if tensor is not None:
                tensor.fill_(float("nan"))

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        out.fill_(float("nan"))
        raise Broken(1, "a peer died")


@settings(max_examples=60)
@given(st.data())
def test_a_step_that_a_death_interrupted_keeps_what_survived_and_comes_to_the_same_bits(data):
    num_leaves = data.draw(st.integers(2, 13))
    size = data.draw(st.integers(2, min(5, num_leaves)))
    dead = data.draw(st.integers(0, size - 1))
    at = data.draw(st.sampled_from(["fold", "exchange", "all_gather"]))
    dealt = even(num_leaves, size)
    computed: list[int] = []

    def compute_for(model: Parameters, limit: int) -> Any:
        def compute(leaf: int) -> Tensor:
            nonlocal limit
            if not limit:
                raise Broken(1, "a newer world was ordered")
            limit -= 1
            computed.append(leaf)
            return backward(model, leaf)

        return compute

    models = [Parameters() for _ in range(size)]
    bucket_mib = data.draw(BUCKETS_MIB)
    reductions = [TreeReduction(GradientRows(model, num_leaves), bucket_mib) for model in models]
    for reduction, model in zip(reductions, models, strict=True):  # a step before, which teaches
        reduction.reduce(
            ThreadWorld(0, 1, {}, threading.Barrier(1)), [range(num_leaves)], partial(backward, model)
        )
        reduction.forget()
    for rank in range(size):
        limit = data.draw(st.integers(0, len(dealt[rank]))) if at == "fold" else num_leaves
        world = BrokenWorld(rank, size, at)
        with pytest.raises(Broken):
            reductions[rank].reduce(world, dealt, compute_for(models[rank], limit))
        world.leave()
    survivors = [rank for rank in range(size) if rank != dead]
    kept = [leaf for rank in survivors for leaf in reductions[rank].held()]
    again = deal_rest(num_leaves, [reductions[rank].held() for rank in survivors])
    assert sorted(leaf for hand in again for leaf in hand) == list(range(num_leaves))
    computed.clear()
    board: dict[Any, Any] = {}
    barrier = threading.Barrier(len(survivors), timeout=5)

    def finish(place: int) -> bytes:
        rank = survivors[place]
        world = ThreadWorld(place, len(survivors), board, barrier)
        reductions[rank].reduce(world, again, compute_for(models[rank], num_leaves))
        world.leave()
        return torch.cat([parameter.grad.flatten() for parameter in models[rank].all]).numpy().tobytes()

    with ThreadPoolExecutor(len(survivors)) as pool:
        results = set(pool.map(finish, range(len(survivors))))
    assert sorted(computed + kept) == list(range(num_leaves)), "something was computed twice, or not at all"
    assert results == {reduced(TreeReduction, even(num_leaves, 1), num_leaves)[0][1].numpy().tobytes()}


@given(st.integers(1, 40), st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6))
def test_dealing_by_speed_is_a_cover_and_never_slower_than_an_even_one(num_virtual, seconds):
    num_virtual = max(num_virtual, len(seconds))
    dealt = deal(num_virtual, seconds)
    slowest = max(len(hand) * each for hand, each in zip(dealt, seconds, strict=True))
    evenly = max(
        len(hand) * each for hand, each in zip(even(num_virtual, len(seconds)), seconds, strict=True)
    )
    assert [leaf for hand in dealt for leaf in hand] == list(range(num_virtual))
    assert min(map(len, dealt)) >= 1
    assert slowest <= evenly


def test_a_rank_at_half_speed_gets_about_half_the_work():
    assert [len(hand) for hand in deal(28, (1.0, 1.0, 1.0, 2.0))] == [8, 8, 8, 4]
    assert [len(hand) for hand in deal(28, (1.0, 1.0, 1.05, 1.0))] == [7, 7, 7, 7]
