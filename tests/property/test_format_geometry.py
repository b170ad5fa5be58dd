"""Splitting and sharding cover every element exactly once, whatever the shape."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.format.layout import Box, Mesh, Replicate, Shard, shard_box, split_box

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(shapes, st.integers(1, 40), st.sampled_from([1, 2, 4, 8]))
def test_a_split_covers_its_box_once_with_contiguous_pieces_that_fit(shape, max_elements, itemsize):
    whole = Box.whole(shape)
    pieces = split_box(whole, itemsize, max_elements * itemsize)
    order = np.arange(whole.numel).reshape(shape)
    seen = [order[piece.within(whole)].reshape(-1) for piece in pieces]
    assert all(piece.numel <= max_elements for piece in pieces)
    assert np.concatenate([*seen, np.array([], int)]).tolist() == list(range(whole.numel))


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
def test_the_shards_of_a_mesh_cover_a_tensor_once_per_replica(data, shape):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    mesh = Mesh(tuple((f"axis{i}", size) for i, size in enumerate(sizes)))
    placements = [
        data.draw(st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape)))])) for _ in sizes
    ]
    num_replicas = int(
        np.prod([size for size, placement in zip(sizes, placements, strict=True) if placement == Replicate()])
    )
    held = np.zeros(shape, int)
    for rank in range(mesh.size):
        held[shard_box(shape, mesh, placements, rank).within(Box.whole(shape))] += 1
    assert (held == num_replicas).all()


boxes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=2).map(
    lambda pairs: Box(tuple(a for a, _ in pairs), tuple(n for _, n in pairs))
)


@given(boxes, boxes)
def test_an_intersection_holds_exactly_the_common_elements(one, other):
    def elements(box):
        return {(i, j) for i in range(box.start[0], box.stop[0]) for j in range(box.start[1], box.stop[1])}

    common = one.intersect(other)
    assert (elements(common) if common else set()) == elements(one) & elements(other)
    assert common == other.intersect(one)
