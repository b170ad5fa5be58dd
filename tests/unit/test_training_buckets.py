"""Which buckets are started when, as backward completes the gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.errors import JobRejected
from elastic.training.buckets import Buckets
from elastic.training.gradients import GradientRows

LAYERS, WIDTH, VIRTUAL_RANKS = 4, 64, 8
LAYER_MIB = WIDTH * WIDTH * 4 / 2**20


class Stack(nn.Module):
    """Square layers, some of which a micro-batch may leave out or use in a backward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def loss(self, used: set[int]) -> Tensor:
        x: Tensor = torch.ones(WIDTH)
        for index, layer in enumerate(self.layers):
            x = layer(x) if index in used else x
        return x.sum()


class Watched:
    """A model whose buckets only note when they were started, and after how many of its gradients."""

    def __init__(self, bucket_mib: float) -> None:
        self.model = Stack()
        self.rows = GradientRows(self.model, VIRTUAL_RANKS)
        self.num_gradients = 0
        for weight in self.model.parameters():
            hook: Any = weight.register_post_accumulate_grad_hook
            hook(self._count)
        self.buckets = Buckets(self.rows, bucket_mib)
        self.started: list[tuple[slice, int]] = []

    def leaf(self, used: set[int], pieces: int = 1, world_size: int = 1) -> list[tuple[slice, int]]:
        self.started, self.num_gradients = [], 0
        self.rows.bind(self.rows.take())
        with self.buckets.watch(self.buckets.cut(world_size), self._start):
            for _ in range(pieces):
                self.model.loss(used).backward()
            self.num_gradients = -1  # after backward
        return self.started

    def _count(self, _: Any) -> None:
        self.num_gradients += 1

    def _start(self, bucket: slice) -> None:
        self.started.append((bucket, self.num_gradients))


ALL = set(range(LAYERS))
# The losses lie before the gradients, so that each bucket has the end of the layer before its own, too.
OVERLAPPED = [2, 3, 4, -1]


def test_a_bucket_starts_with_its_last_gradient_and_the_one_with_the_losses_after_backward():
    watched = Watched(LAYER_MIB)
    assert [when for _, when in watched.leaf(ALL)] == [-1] * 4, "nothing is known of the first micro-batch"
    assert [when for _, when in watched.leaf(ALL)] == OVERLAPPED


def test_one_bucket_or_no_size_reduces_after_backward():
    for bucket_mib in (0.0, 100.0):
        watched = Watched(bucket_mib)
        assert [[when for _, when in watched.leaf(ALL)] for _ in range(2)] == [[-1], [-1]]


def test_a_bucket_without_a_gradient_waits_for_the_end_and_those_after_it_keep_their_order():
    watched = Watched(LAYER_MIB)
    order = [bucket for bucket, _ in watched.leaf(ALL)]
    assert watched.leaf(ALL - {1}) == list(zip(order, [2, -1, -1, -1], strict=True))
    assert watched.leaf(ALL) == list(zip(order, OVERLAPPED, strict=True))


def test_a_gradient_that_comes_in_as_many_pieces_as_usual_starts_with_the_last_of_them():
    watched = Watched(LAYER_MIB)
    watched.leaf(ALL, pieces=2)
    assert [when for _, when in watched.leaf(ALL, pieces=2)] == [6, 7, 8, -1]


def test_a_piece_that_comes_after_its_bucket_has_started_fails_by_name_instead_of_being_lost():
    watched = Watched(LAYER_MIB)
    watched.leaf(ALL)
    with pytest.raises(JobRejected, match=r"layers\.3\.weight got its gradient in 2 pieces.*bucket_mib = 0"):
        watched.leaf(ALL, pieces=2)
    assert [when for _, when in watched.leaf(ALL)] == OVERLAPPED, "what failed teaches nothing"


@given(st.integers(1, VIRTUAL_RANKS), st.floats(0, 2 * LAYERS * LAYER_MIB))
def test_any_cut_covers_the_row_once_from_its_end_in_equal_aligned_slices_for_every_rank(world_size, mib):
    rows = GradientRows(Stack(), VIRTUAL_RANKS)
    buckets = Buckets(rows, mib).cut(world_size)
    assert buckets[0].stop <= len(rows.take())
    assert buckets[0].stop >= rows.num_elements
    assert [each.stop for each in buckets[1:]] + [0] == [each.start for each in buckets]
    assert all((each.stop - each.start) % (16 * world_size) == 0 < each.stop - each.start for each in buckets)
