"""Shares agree with torch's own DTensor arithmetic: random meshes, placements and uneven shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import placement_types as theirs
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from checkpoint.format.flat import share_of
from checkpoint.format.layout import (
    FlatGroup,
    Layout,
    Mesh,
    Partial,
    Placement,
    Replicate,
    Shard,
    Spread,
    StridedShard,
    local_shape,
    parts_of,
)

meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
shapes = st.lists(st.integers(0, 11), min_size=1, max_size=3).map(tuple)


def placements_for(shape) -> st.SearchStrategy[Placement]:
    dims = st.integers(0, len(shape) - 1)
    return st.one_of(
        st.just(Replicate()),
        st.just(Partial()),
        st.builds(Shard, dims),
        st.builds(StridedShard, dims, st.integers(1, 4)),
    )


def torch_placement(placement: Placement) -> theirs.Placement:
    match placement:
        case Shard(dim):
            return theirs.Shard(dim)
        case StridedShard(dim, split):
            return theirs._StridedShard(dim, split_factor=split)
        case Partial():
            return theirs.Partial()
        case _:
            return theirs.Replicate()


def torch_local(
    whole: torch.Tensor, mesh: Mesh, placements: list[theirs.Placement], rank: int
) -> torch.Tensor:
    """Cut a tensor as torch does, axis by axis, with torch's own splitting."""
    local = whole
    for (_, ranks), coordinate, placement in zip(mesh.axes, mesh.coordinates(rank), placements, strict=True):
        if isinstance(placement, theirs.Shard | theirs._StridedShard):
            local = placement._split_tensor(local, ranks, with_padding=False, contiguous=True)[0][coordinate]
    return local


@given(st.data(), meshes, shapes)
def test_each_rank_holds_what_torch_gives_it(data, sizes, shape):
    mesh = Mesh(tuple((f"axis{number}", size) for number, size in enumerate(sizes)))
    placements = tuple(data.draw(placements_for(shape)) for _ in sizes)
    spread = Spread(mesh, placements)
    whole = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    for rank in range(mesh.size):
        expected = torch_local(whole, mesh, [torch_placement(one) for one in placements], rank)
        assert local_shape(spread, shape, rank) == tuple(expected.shape)
        found = torch.full_like(expected, -1)
        for part in parts_of(spread, shape, rank):
            found[slices(part.local)] = whole[slices(part.box)]
        assert torch.equal(found, expected)


@given(st.data(), meshes, shapes)
def test_local_shapes_and_offsets_are_those_that_torch_computes(data, sizes, shape):
    mesh = Mesh(tuple((f"axis{number}", size) for number, size in enumerate(sizes)))
    placements = tuple(data.draw(placements_for(shape)) for _ in sizes)
    spread = Spread(mesh, placements)
    for rank in range(mesh.size):
        size, offset = _compute_local_shape_and_global_offset(
            shape, sizes, list(mesh.coordinates(rank)), [torch_placement(one) for one in placements]
        )
        assert local_shape(spread, shape, rank) == size
        parts = parts_of(spread, shape, rank)
        assert bool(parts) == (0 not in size)
        if parts:
            assert parts[0].box.start == offset


@pytest.mark.parametrize("num_rows", [24, 48])
@pytest.mark.parametrize(("data_ranks", "tensor_ranks"), [(2, 2), (3, 2), (2, 4)])
def test_a_strided_shard_is_the_shard_of_a_shard(num_rows: int, data_ranks: int, tensor_ranks: int):
    """FSDP2 over tensor parallelism: the tensor axis, although the inner one, has divided the rows first."""
    mesh = Mesh((("shard", data_ranks), ("tensor", tensor_ranks)))
    spread = Spread(mesh, (StridedShard(0, tensor_ranks), Shard(0)))
    rows = torch.arange(num_rows)
    for rank in range(mesh.size):
        outer, inner = mesh.coordinates(rank)
        expected = rows.chunk(tensor_ranks)[inner].chunk(data_ranks)[outer]
        (part,) = parts_of(spread, (num_rows,), rank)
        assert rows[slices(part.box)].tolist() == expected.tolist()


def slices(box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("numels", [(7,), (6, 4), (1, 1), (3, 5, 2)])
def test_a_flat_group_is_divided_like_the_flat_parameter_of_fsdp_1(world: int, numels: tuple[int, ...]):
    names = tuple(f"parameter{number}" for number in range(len(numels)))
    placed: dict[str, tuple[Placement, ...]] = {name: (Replicate(),) for name in names}
    layout = Layout(Mesh((("shard", world),)), placed, (FlatGroup(names, ("shard",)),))
    flat = torch.arange(sum(numels))
    wholes = dict(zip(names, flat.split(numels), strict=True))
    for rank in range(world):
        expected, _ = FlatParamHandle._get_unpadded_shard(flat, rank, world)
        share = share_of(layout, {name: (len(whole),) for name, whole in wholes.items()}, rank)
        found = [wholes[name][slices(part.box)] for name, parts in share.items() for part in parts]
        assert torch.cat([*found, torch.empty(0, dtype=torch.long)]).tolist() == expected.tolist()
