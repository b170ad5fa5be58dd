"""Random layouts, and a plain numpy account of what each rank holds that shares no code with ours."""

import math

import numpy as np
from hypothesis import strategies as st

from checkpoint.format.layout import (
    Mesh,
    Only,
    Partial,
    Placement,
    Replicate,
    SectionShard,
    Shard,
    StridedShard,
)

meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(
    lambda sizes: Mesh(tuple((f"axis{number}", size) for number, size in enumerate(sizes)))
)
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def placements(draw, mesh: Mesh, shape: tuple[int, ...]) -> tuple[Placement, ...]:
    """Draw a placement per axis that fits the shape; sections only where they divide a whole dim."""
    drawn: list[Placement] = []
    untouched = set(range(len(shape)))
    for _, ranks in mesh.axes:
        options: list[st.SearchStrategy[Placement]] = [
            st.just(Replicate()),
            st.just(Partial()),
            st.sets(st.integers(0, ranks - 1), min_size=1).map(lambda some: Only(tuple(sorted(some)))),
        ]
        if shape:
            dims = st.integers(0, len(shape) - 1)
            options += [st.builds(Shard, dims), st.builds(StridedShard, dims, st.integers(1, 4))]
        if untouched:
            options.append(sections(ranks, shape, sorted(untouched)))
        placement = draw(st.one_of(options))
        untouched -= {getattr(placement, "dim", None)}
        drawn.append(placement)
    return tuple(drawn)


@st.composite
def sections(draw, ranks: int, shape: tuple[int, ...], dims: list[int]) -> SectionShard:
    """Draw up to three sections of a dim, each cut into a random piece per rank."""
    dim = draw(st.sampled_from(dims))
    num_cuts = ranks * draw(st.integers(1, 3)) - 1
    cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=num_cuts, max_size=num_cuts)))
    sizes = np.diff([0, *cuts, shape[dim]]).tolist()
    return SectionShard(dim, tuple(tuple(sizes[at : at + ranks]) for at in range(0, len(sizes), ranks)))


def numpy_local(whole: np.ndarray, mesh: Mesh, chosen: tuple[Placement, ...], rank: int) -> np.ndarray | None:
    """Return a rank's own tensor by cutting the whole one axis by axis; None if it has none."""
    places = np.unravel_index(rank, [size for _, size in mesh.axes])
    local = whole
    for (_, ranks), place, placement in zip(mesh.axes, places, chosen, strict=True):
        match placement:
            case Only(coordinates):
                if place not in coordinates:
                    return None
            case Shard(dim):
                local = numpy_chunk(local, ranks, dim)[place]
            case StridedShard(dim, split):
                pieces = numpy_chunk(local, split, dim)
                local = np.concatenate([numpy_chunk(one, ranks, dim)[place] for one in pieces], dim)
            case SectionShard(dim, parts):
                cuts = np.cumsum([size for sizes in parts for size in sizes])[:-1]
                pieces = np.split(local, cuts, dim)
                local = np.concatenate(pieces[place::ranks], dim)
    return local


def numpy_chunk(array: np.ndarray, ranks: int, dim: int) -> list[np.ndarray]:
    """Cut as `torch.chunk` does, with empty arrays where nothing is left."""
    step = math.ceil(array.shape[dim] / ranks) or 1
    return np.split(array, [min(step * rank, array.shape[dim]) for rank in range(1, ranks)], dim)


def filled(whole: np.ndarray, parts, shape: tuple[int, ...]) -> np.ndarray:
    """Fill a rank's own tensor of this shape from the whole one; -1 where no part says anything."""
    local = np.full(shape, -1)
    for part in parts:
        local[slices(part.local)] = whole[slices(part.box)].reshape(part.local.size)
    return local


def slices(box) -> tuple[slice, ...]:
    """Return what a box selects."""
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
