"""Boxes, meshes and shards: the geometry agrees with torch's and misses or doubles nothing."""

import pytest
import torch

from checkpoint.errors import FormatError
from checkpoint.format.layout import Box, Mesh, Partial, Replicate, Shard, shard_box, split_box


def test_a_box_knows_where_it_stops_and_what_it_holds():
    box = Box((1, 2), (3, 4))
    assert (box.stop, box.numel, box.is_empty) == ((4, 6), 12, False)
    assert Box.whole(()).numel == 1
    assert Box.whole((3, 0)).is_empty


def test_boxes_intersect_in_what_both_hold():
    assert Box((0, 0), (4, 4)).intersect(Box((2, 3), (9, 9))) == Box((2, 3), (2, 1))
    assert Box((0,), (4,)).intersect(Box((4,), (1,))) is None
    assert Box((0,), (4,)).intersect(Box((2,), (0,))) is None
    assert Box.whole(()).intersect(Box.whole(())) == Box((), ())


def test_a_box_within_another_is_a_slice_of_it():
    assert Box((3, 5), (1, 2)).within(Box((2, 5), (4, 4))) == (slice(1, 2), slice(0, 2))
    with pytest.raises(FormatError, match="does not lie within"):
        Box((0,), (3,)).within(Box((1,), (9,)))
    with pytest.raises(FormatError, match="does not lie within"):
        Box((0,), (3,)).within(Box((0,), (2,)))


@pytest.mark.parametrize(("start", "size"), [((0,), (1, 1)), ((-1,), (1,)), ((0,), (-1,))])
def test_a_box_that_cannot_be_is_refused(start: tuple[int, ...], size: tuple[int, ...]):
    with pytest.raises(FormatError):
        Box(start, size)


def test_boxes_of_tensors_of_different_rank_do_not_meet():
    with pytest.raises(FormatError, match="different rank"):
        Box((0,), (1,)).intersect(Box((), ()))


def test_the_last_axis_of_a_mesh_varies_fastest():
    mesh = Mesh((("replica", 2), ("shard", 3)))
    assert [mesh.coordinates(rank) for rank in range(mesh.size)] == [
        (a, b) for a in range(2) for b in range(3)
    ]
    with pytest.raises(FormatError, match="rank 6"):
        mesh.coordinates(6)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 7, 8, 9, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_shards_are_those_of_torch_chunk(num_rows: int, ranks: int):
    rows = torch.arange(num_rows)
    expected = [chunk.tolist() for chunk in rows.chunk(ranks)]
    expected += [[]] * (ranks - len(expected))
    mesh = Mesh((("shard", ranks),))
    boxes = [shard_box((num_rows, 2), mesh, [Shard(0)], rank) for rank in range(ranks)]
    assert [list(range(box.start[0], box.stop[0])) for box in boxes] == [list(one) for one in expected]


def test_replicas_and_partial_sums_hold_the_whole_region():
    mesh = Mesh((("replica", 2), ("sum", 2), ("shard", 2)))
    boxes = {shard_box((4, 4), mesh, [Replicate(), Partial(), Shard(1)], rank) for rank in range(8)}
    assert boxes == {Box((0, 0), (4, 2)), Box((0, 2), (4, 2))}


def test_two_axes_that_shard_one_dim_divide_it_one_after_the_other():
    mesh = Mesh((("outer", 2), ("inner", 2)))
    boxes = [shard_box((10,), mesh, [Shard(0), Shard(0)], rank) for rank in range(4)]
    assert [(box.start[0], box.size[0]) for box in boxes] == [(0, 3), (3, 2), (5, 3), (8, 2)]


def test_a_shard_of_a_dim_that_is_not_there_is_refused():
    mesh = Mesh((("shard", 2),))
    with pytest.raises(FormatError, match="dim 1"):
        shard_box((4,), mesh, [Shard(1)], 0)
    with pytest.raises(FormatError, match="placements"):
        shard_box((4,), mesh, [], 0)


def test_a_box_is_split_into_rows_as_far_as_they_fit():
    assert split_box(Box.whole((10, 4)), 4, 64) == [
        Box((0, 0), (4, 4)),
        Box((4, 0), (4, 4)),
        Box((8, 0), (2, 4)),
    ]
    assert split_box(Box.whole((2, 8)), 4, 16) == [
        Box((row, column), (1, 4)) for row in range(2) for column in (0, 4)
    ]
    assert split_box(Box.whole(()), 8, 8) == [Box((), ())]
    assert split_box(Box.whole((3, 0)), 8, 8) == []
    with pytest.raises(FormatError, match="does not fit"):
        split_box(Box.whole((3,)), 8, 4)
