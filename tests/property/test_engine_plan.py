"""Plans are arithmetic: every element has one writer, the load is even, and copies fill what is wanted."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.engine.plan import Piece, TensorSpec, check_cover, deal_pieces, plan_restore, plan_save
from checkpoint.errors import Incomplete
from checkpoint.format.dtypes import itemsize
from checkpoint.format.layout import Box, split_box
from checkpoint.format.records import MAX_CHUNK_BYTES

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
specs = st.builds(TensorSpec, st.text(max_size=3), st.sampled_from(["float32", "bfloat16", "bool"]), shapes)


def cut(shape: tuple[int, ...], max_bytes: int) -> list[Box]:
    return split_box(Box.whole(shape), 1, max_bytes)


@given(st.lists(specs, max_size=8), st.integers(1, 9))
def test_every_element_is_written_exactly_once_and_by_a_rank_that_exists(tensors, num_writers):
    writes = plan_save(tensors, num_writers)
    assert {write.writer for write in writes} <= set(range(num_writers))
    for number, spec in enumerate(tensors):
        check_cover(spec.name, spec.shape, [write.box for write in writes if write.tensor == number])


def test_no_chunk_is_larger_than_four_mebibytes_and_large_tensors_are_shared_evenly():
    tensors = [TensorSpec("a", "float32", (5000, 4096)), TensorSpec("b", "float32", (70_000,))]
    writes = plan_save(tensors, 4)
    sizes = [write.box.numel * itemsize(tensors[write.tensor].dtype) for write in writes]
    assert max(sizes) <= MAX_CHUNK_BYTES
    loads = [0] * 4
    for size, write in zip(sizes, writes, strict=True):
        loads[write.writer] += size
    assert max(loads) - min(loads) <= MAX_CHUNK_BYTES


@given(st.lists(specs, max_size=6), st.data())
def test_a_piece_is_written_by_one_of_its_holders(tensors, data):
    holders = st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True).map(tuple)
    pieces = [Piece(n, Box.whole(spec.shape), data.draw(holders)) for n, spec in enumerate(tensors)]
    for write in deal_pieces(tensors, pieces):
        assert write.writer in pieces[write.tensor].holders


@given(shapes, st.integers(1, 40), st.integers(1, 40))
def test_copies_fill_wanted_boxes_with_the_elements_that_are_stored(shape, stored_bytes, wanted_bytes):
    source = np.arange(math.prod(shape)).reshape(shape)
    stored, wanted = cut(shape, stored_bytes), cut(shape, wanted_bytes)
    targets = [np.full(box.size, -1) for box in wanted]
    for copy in plan_restore(stored, wanted):
        piece = source[stored[copy.chunk].within(Box.whole(shape))]
        targets[copy.wanted][copy.box.within(wanted[copy.wanted])] = piece[
            copy.box.within(stored[copy.chunk])
        ]
    for box, target in zip(wanted, targets, strict=True):
        assert np.array_equal(target, source[box.within(Box.whole(shape))])


@given(shapes.filter(lambda shape: math.prod(shape) > 0), st.integers(1, 12), st.data())
def test_a_missing_or_doubled_chunk_is_noticed(shape, max_bytes, data):
    boxes = cut(shape, max_bytes)
    victim = data.draw(st.integers(0, len(boxes) - 1))
    rest = boxes[:victim] + boxes[victim + 1 :]
    with pytest.raises(Incomplete):
        plan_restore(rest, [Box.whole(shape)])
    with pytest.raises(Incomplete):
        check_cover("w", shape, rest)
    with pytest.raises(Incomplete):
        check_cover("w", shape, [*boxes, boxes[victim]])


def test_two_overlapping_boxes_with_the_right_number_of_elements_are_no_cover():
    with pytest.raises(Incomplete, match="exactly once"):
        check_cover("w", (4, 4), [Box((0, 0), (2, 4)), Box((1, 0), (2, 4))])


def test_a_box_outside_of_its_tensor_is_no_cover():
    with pytest.raises(Incomplete, match="outside"):
        check_cover("w", (4,), [Box((2,), (4,))])
