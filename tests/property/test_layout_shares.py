"""Shares of every rank: what numpy would give it, each element once per replica, padding never."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import FormatError
from checkpoint.format.box import boxes_of_run, runs_of
from checkpoint.format.flat import FlatPlan, cover_in, flat_plan_of, plan_flat, share_of
from checkpoint.format.layout import (
    Box,
    FlatGroup,
    Layout,
    Mesh,
    Only,
    Partial,
    Replicate,
    SectionShard,
    Shard,
    Spread,
    StridedShard,
    boxes_of,
    holders_of,
    local_shape,
    parts_of,
)
from tests.layout_samples import filled, meshes, numpy_local, placements, shapes, slices


@given(st.data(), meshes, shapes)
def test_a_rank_holds_what_numpy_cuts_for_it(data, mesh, shape):
    chosen = data.draw(placements(mesh, shape))
    whole = np.arange(math.prod(shape)).reshape(shape)
    spread = Spread(mesh, chosen)
    for rank in range(mesh.size):
        expected = numpy_local(whole, mesh, chosen, rank)
        if expected is None:
            assert (local_shape(spread, shape, rank), parts_of(spread, shape, rank)) == (None, ())
            continue
        assert local_shape(spread, shape, rank) == expected.shape
        assert (filled(whole, parts_of(spread, shape, rank), expected.shape) == expected).all()


@given(st.data(), meshes, shapes)
def test_the_shares_of_all_ranks_cover_a_tensor_once_per_replica(data, mesh, shape):
    chosen = data.draw(placements(mesh, shape))
    copies = math.prod(
        ranks if isinstance(one, Replicate | Partial) else len(one.coordinates)
        for (_, ranks), one in zip(mesh.axes, chosen, strict=True)
        if isinstance(one, Replicate | Partial | Only)
    )
    held = np.zeros(shape, int)
    for boxes in boxes_of(Spread(mesh, chosen), shape):
        for box in boxes:
            held[slices(box)] += 1
    assert (held == copies).all()


@given(st.data(), meshes, shapes)
def test_all_ranks_at_once_and_one_at_a_time_say_the_same(data, mesh, shape):
    spread = Spread(mesh, data.draw(placements(mesh, shape)))
    one_by_one = [tuple(part.box for part in parts_of(spread, shape, rank)) for rank in range(mesh.size)]
    assert boxes_of(spread, shape) == one_by_one


@given(st.data(), meshes, shapes)
def test_the_holders_of_a_box_are_all_ranks_that_hold_it(data, mesh, shape):
    spread = Spread(mesh, data.draw(placements(mesh, shape)))
    if Partial() in spread.placements:
        with pytest.raises(FormatError, match="reduce the tensor first"):
            holders_of(spread, shape)
        return
    boxes = boxes_of(spread, shape)
    holders = holders_of(spread, shape)
    assert sum(box.numel for box in holders) == math.prod(shape)  # no two of them overlap: they cover it once
    for box, ranks in holders.items():
        assert ranks == tuple(rank for rank in range(mesh.size) if box in boxes[rank])


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (5,), (2, 3), (3, 1), (3, 0), (2, 3, 2), (1, 2, 3), (2, 2, 2, 3)]
)
def test_a_run_of_a_raveled_tensor_is_at_most_two_boxes_a_dim_less_one(shape: tuple[int, ...]):
    numel = math.prod(shape)
    whole = np.arange(numel).reshape(shape)
    for first, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
        boxes = boxes_of_run(shape, first, stop)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        found = [whole[slices(box)].reshape(-1) for box in boxes]
        assert np.concatenate([*found, []]).tolist() == list(range(first, stop))
    for outside in ((-1, 0), (0, numel + 1), (1, 0)):
        with pytest.raises(FormatError, match="do not lie in"):
            boxes_of_run(shape, *outside)


@given(st.data(), shapes)
def test_the_runs_of_a_box_are_its_elements_in_raveled_order(data, shape):
    start = tuple(data.draw(st.integers(0, size)) for size in shape)
    box = Box(start, tuple(data.draw(st.integers(0, n - a)) for n, a in zip(shape, start, strict=True)))
    whole = np.arange(math.prod(shape)).reshape(shape)
    found: list[int] = []
    for run, first in runs_of(box, shape):
        assert whole[slices(run)].reshape(-1).tolist() == list(range(first, first + run.numel))
        found += range(first, first + run.numel)
    assert found == sorted(whole[slices(box)].reshape(-1).tolist())


# ------------------------------------------------------------------------------------- flat partitions


def numpy_flat_part(locals_: list[np.ndarray], num_parts: int, number: int, group: FlatGroup) -> np.ndarray:
    """Flatten, align, pad and cut as the frameworks do: padding is -1."""
    flat = np.empty(0, int)
    for local in locals_:
        flat = np.concatenate([flat, np.full(-len(flat) % group.start_multiple, -1), local.reshape(-1)])
    flat = np.concatenate([flat, np.full(-len(flat) % (num_parts * group.part_multiple), -1)])
    part: np.ndarray = flat.reshape(num_parts, -1)[number]
    return part


@given(st.data(), st.lists(shapes, min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3))
def test_a_flat_part_is_a_slice_of_the_raveled_tensors_and_padding_is_in_no_share(data, group_shapes, dp, tp):
    mesh = Mesh((("replica", dp), ("tensor", tp)))
    names = [f"tensor{number}" for number in range(len(group_shapes))]
    sizes = dict(zip(names, group_shapes, strict=True))
    chosen = {
        name: (Replicate(), *data.draw(placements(Mesh((("tensor", tp),)), shape)))
        for name, shape in sizes.items()
    }
    multiples = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    group = FlatGroup(tuple(names), ("replica",), *multiples)
    layout = Layout(mesh, chosen, (group,))
    wholes, origin = {}, 0
    for name, shape in sizes.items():
        wholes[name] = origin + np.arange(math.prod(shape)).reshape(shape)
        origin += math.prod(shape)
    for rank in range(mesh.size):
        number = rank // tp
        locals_ = [numpy_local(wholes[name], mesh, chosen[name], rank) for name in names]
        expected = numpy_flat_part([one for one in locals_ if one is not None], dp, number, group)
        found = np.full(len(expected), -1)
        for name, parts in share_of(layout, sizes, rank).items():
            for part in parts:
                assert (found[slices(part.local)] == -1).all()
                found[slices(part.local)] = wholes[name][slices(part.box)].reshape(-1)
        assert found.tolist() == expected.tolist()
        assert flat_plan_of(layout, group, sizes, rank).part_length == len(expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1,), (0, 3)])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_zero_3_gives_each_rank_the_real_length_the_papers_formula_does(shape: tuple[int, ...], world: int):
    """max(0, min(partitioned, numel - rank * partitioned)), with partitioned = ceil(numel / world)."""
    layout = Layout(
        Mesh((("replica", world),)), {"weight": (Replicate(),)}, (FlatGroup(("weight",), ("replica",)),)
    )
    numel = math.prod(shape)
    partitioned = math.ceil(numel / world)
    for rank in range(world):
        (parts,) = share_of(layout, {"weight": shape}, rank).values()
        real = sum(part.box.numel for part in parts)
        assert real == max(0, min(partitioned, numel - rank * partitioned))
        assert sum(part.local.numel for part in parts) == real


def test_a_flat_plan_aligns_tensors_and_parts():
    plan = plan_flat(FlatGroup(("a", "b"), ("replica",), 4, 2), {"a": 3, "b": 6}, 3)
    assert plan == FlatPlan({"a": 0, "b": 4}, 4)


def test_parts_over_several_axes_are_numbered_row_major_and_other_axes_hold_copies():
    mesh = Mesh((("replica", 2), ("tensor", 2), ("expert", 2)))
    layout = Layout(mesh, {"w": (Replicate(),) * 3}, (FlatGroup(("w",), ("replica", "expert")),))
    starts = [share_of(layout, {"w": (8,)}, rank)["w"][0].box.start for rank in mesh.members]
    assert starts == [(0,), (2,), (0,), (2,), (4,), (6,), (4,), (6,)]
    assert list(cover_in(layout, {"w": (8,)})) == [("w", Box((start,), (2,))) for start in (0, 2, 4, 6)]


def test_flat_groups_that_cannot_be_are_refused():
    mesh = Mesh((("replica", 2),))
    group = FlatGroup(("w",), ("replica",))
    for layout, message in [
        (Layout(mesh, {"w": (Shard(0),)}, (group,)), "divided over an axis of its flat group"),
        (Layout(mesh, {"w": (Replicate(),)}, (group, group)), "in two flat groups"),
        (Layout(mesh, {"v": (Replicate(),)}, (group,)), "whose shapes are not given"),
        (Layout(mesh, {"w": (Replicate(),)}, (FlatGroup(("w",), ("shard",)),)), "no axis 'shard'"),
        (Layout(mesh, {"w": (Replicate(),)}, (FlatGroup(("w",), ("replica",), 0),)), "multiples"),
    ]:
        with pytest.raises(FormatError, match=message):
            share_of(layout, {"w": (4,)}, 0)


def test_sections_have_to_add_up():
    spread = Spread(Mesh((("tensor", 2),)), (SectionShard(0, ((2, 1), (1, 1))),))
    assert [local_shape(spread, (5,), rank) for rank in range(2)] == [(3,), (2,)]
    with pytest.raises(FormatError, match="add up to 5, not to 6"):
        boxes_of(spread, (6,))
    with pytest.raises(FormatError, match="one size for each"):
        boxes_of(Spread(spread.mesh, (SectionShard(0, ((5,),)),)), (5,))
    with pytest.raises(FormatError, match="into 0 pieces"):
        boxes_of(Spread(spread.mesh, (StridedShard(0, 0),)), (5,))
    with pytest.raises(FormatError, match="not all of"):
        boxes_of(Spread(spread.mesh, (Only((2,)),)), (5,))
