"""Plans are arithmetic: every element has one writer, the load is even, and copies fill what is wanted."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.engine.plan import (
    Piece,
    TensorSpec,
    Write,
    check_chunks,
    check_cover,
    deal_pieces,
    plan_copies,
)
from checkpoint.engine.regions import Regions, find_outside, find_uncovered, meet, padded
from checkpoint.errors import Incomplete
from checkpoint.format.codec import Codec
from checkpoint.format.dtypes import itemsize
from checkpoint.format.layout import Box, split_box
from checkpoint.format.records import MAX_CHUNK_BYTES, ChunkRecord
from checkpoint.format.table import ChunkTable
from tests.restore_samples import random_cuts

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
specs = st.builds(TensorSpec, st.text(max_size=3), st.sampled_from(["float32", "bfloat16", "bool"]), shapes)


def cut(shape: tuple[int, ...], max_bytes: int) -> list[Box]:
    return split_box(Box.whole(shape), 1, max_bytes)


def dealt(tensors: Sequence[TensorSpec], num_writers: int) -> list[Write]:
    """Deal what every rank holds in full."""
    everyone = tuple(range(num_writers))
    return deal_pieces(tensors, [Piece(n, Box.whole(spec.shape), everyone) for n, spec in enumerate(tensors)])


def copies_of(stored: Sequence[Box], wanted: Sequence[Box]) -> list[tuple[int, int, Box]]:
    """List what fills wanted boxes of one tensor: (stored box, wanted box, what goes there)."""
    found = plan_copies(Regions.of(stored), Regions.of(wanted))
    pairs = zip(found.left.tolist(), found.right.tolist(), strict=True)
    return [
        (chunk, number, found.common.box(row, len(wanted[number].size)))
        for row, (chunk, number) in enumerate(pairs)
    ]


@given(st.lists(specs, max_size=8), st.integers(1, 9))
def test_every_element_is_written_exactly_once_and_by_a_rank_that_exists(tensors, num_writers):
    writes = dealt(tensors, num_writers)
    assert {write.writer for write in writes} <= set(range(num_writers))
    for number, spec in enumerate(tensors):
        check_cover(spec.name, spec.shape, [write.box for write in writes if write.tensor == number])


def test_no_chunk_is_larger_than_four_mebibytes_and_large_tensors_are_shared_evenly():
    tensors = [TensorSpec("a", "float32", (5000, 4096)), TensorSpec("b", "float32", (70_000,))]
    writes = dealt(tensors, 4)
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
    for chunk, number, box in copies_of(stored, wanted):
        piece = source[stored[chunk].within(Box.whole(shape))]
        targets[number][box.within(wanted[number])] = piece[box.within(stored[chunk])]
    for box, target in zip(wanted, targets, strict=True):
        assert np.array_equal(target, source[box.within(Box.whole(shape))])


@given(shapes.filter(lambda shape: math.prod(shape) > 0), st.integers(1, 12), st.data())
def test_a_missing_or_doubled_chunk_is_noticed(shape, max_bytes, data):
    boxes = cut(shape, max_bytes)
    victim = data.draw(st.integers(0, len(boxes) - 1))
    rest = boxes[:victim] + boxes[victim + 1 :]
    with pytest.raises(Incomplete):
        copies_of(rest, [Box.whole(shape)])
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


chances = st.integers(0, 2**32).map(random.Random)
many_shapes = st.lists(st.lists(st.integers(1, 6), max_size=4).map(tuple), min_size=1, max_size=4)


def random_box(chance: random.Random, shape: tuple[int, ...]) -> Box:
    start = tuple(chance.randrange(size) for size in shape)
    return Box(start, tuple(chance.randint(0, size - at) for size, at in zip(shape, start, strict=True)))


def shapes_table(shapes: list[tuple[int, ...]]) -> np.ndarray:
    return padded(shapes, max(map(len, shapes)), 1)


@given(many_shapes, chances)
def test_regions_of_many_tensors_meet_where_their_elements_do(shapes, chance):
    drawn = [
        [(tensor, random_box(chance, shapes[tensor])) for tensor in chance.choices(range(len(shapes)), k=9)]
        for _ in range(2)
    ]
    sides = [Regions.of([box for _, box in side], [tensor for tensor, _ in side]) for side in drawn]
    found = meet(*sides)
    expected = {
        (left, right): common
        for left, (tensor, box) in enumerate(drawn[0])
        for right, (other, wanted) in enumerate(drawn[1])
        if tensor == other and (common := box.intersect(wanted)) is not None
    }
    rows = zip(found.left.tolist(), found.right.tolist(), strict=True)
    ranks = [len(shapes[tensor]) for tensor in found.common.tensors.tolist()]
    assert {pair: found.common.box(row, ranks[row]) for row, pair in enumerate(rows)} == expected
    assert len(found) == len(expected) and (np.diff(found.right) >= 0).all()


@given(many_shapes, chances)
def test_a_cover_is_told_from_anything_else_as_counting_each_element_does(shapes, chance):
    boxes: list[tuple[int, Box]] = []
    for number, shape in enumerate(shapes):
        boxes += [(number, box) for box in random_cuts(chance, Box.whole(shape), 4)]
    for _ in range(chance.randint(0, 2)):  # leave one out, put one in twice, move or resize one
        victim = chance.randrange(len(boxes)) if boxes else 0
        if boxes and chance.random() < 0.5:
            number, _ = boxes.pop(victim)
            boxes += [(number, random_box(chance, shapes[number]))] * chance.randint(0, 1)
        else:
            boxes += [boxes[victim]] if boxes else []
    chance.shuffle(boxes)
    counts = [np.zeros(shape, int) for shape in shapes]
    for number, box in boxes:
        counts[number][box.within(Box.whole(shapes[number]))] += 1
    wrong = {number for number, count in enumerate(counts) if (count != 1).any()}
    regions = Regions.of([box for _, box in boxes], [number for number, _ in boxes])
    found = find_uncovered(regions, shapes_table(shapes), range(len(shapes)))
    assert found in wrong if wrong else found is None


@given(many_shapes, chances)
def test_a_table_of_chunks_is_held_against_the_tensors_that_are_asked_for(shapes, chance):
    boxes = [
        (number, box)
        for number, shape in enumerate(shapes)
        for box in random_cuts(chance, Box.whole(shape), 3)
    ]
    table = ChunkTable.of(
        [ChunkRecord(number, box, Codec.RAW, 0, 0, box.numel, bytes(16), 0) for number, box in boxes]
    )
    tensors = [TensorSpec(f"t{number}", "uint8", shape) for number, shape in enumerate(shapes)]
    check_chunks(tensors, table)
    asked = set(chance.sample(range(len(shapes)), chance.randint(1, len(shapes))))
    check_chunks(tensors, table.of_tensors(asked), asked)
    lost = chance.randrange(len(boxes))
    rest = table.take(np.array([row for row in range(len(boxes)) if row != lost], np.intp))
    with pytest.raises(Incomplete, match=f"'t{boxes[lost][0]}'"):
        check_chunks(tensors, rest)


def test_boxes_that_reach_beyond_what_numbers_hold_lie_outside():
    shapes = np.array([[10, 10]])
    far = Regions(np.zeros(1, np.int64), np.array([[5, 0]]), np.array([[2**63 - 1, 1]]))
    assert find_outside(far, shapes) == 0
    assert find_outside(Regions.of([Box((9, 9), (1, 1))]), shapes) is None
    assert find_outside(Regions.of([Box((9, 9), (1, 2))]), shapes) == 0


def test_sizes_near_the_limit_of_the_format_are_planned_exactly():
    size = 2**59
    stored = [Box((0,), (size // 2,)), Box((size // 2,), (size // 2,))]
    check_cover("w", (size,), stored)
    assert copies_of(stored, [Box((size - 3,), (3,))]) == [(1, 0, Box((size - 3,), (3,)))]
    with pytest.raises(Incomplete):
        check_cover("w", (size,), [stored[0], Box((size // 2 + 1,), (size // 2 - 1,))])
    with pytest.raises(Incomplete, match="leave 1 of"):
        copies_of([stored[0]], [Box((0,), (size // 2 + 1,))])


def test_boxes_too_jagged_to_be_a_saver_s_are_refused_in_bounded_memory():
    chance = random.Random(0)
    shape = (3,) * 14
    boxes = [random_box(chance, shape) for _ in range(64)]
    with pytest.raises(Incomplete):
        check_cover("w", shape, boxes)


def test_the_share_of_a_rank_in_a_million_chunks_is_found():
    per = 1000
    for num_tensors in (10, 1000):
        rows = np.repeat(np.arange(num_tensors), per)
        starts = np.zeros((len(rows), 2), np.int64)
        starts[:, 0] = np.tile(np.arange(per) * 4, num_tensors)
        stored = Regions(rows, starts, np.tile(np.array([[4, 1024]]), (len(rows), 1)))
        numbers = np.arange(num_tensors)
        shapes = np.tile(np.array([[4 * per, 1024]]), (num_tensors, 1))
        assert find_uncovered(stored, shapes, range(num_tensors)) is None
        wanted = Regions(
            numbers, *(np.tile(np.array([one]), (num_tensors, 1)) for one in ((7, 0), (5, 1024)))
        )
        assert len(plan_copies(stored, wanted)) == 2 * num_tensors  # rows 7 to 12: of the chunks 1 and 2
