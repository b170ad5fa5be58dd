"""Geometry: meshes of ranks on named axes, and which boxes of a tensor a rank holds. Pure arithmetic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from types import MappingProxyType

from checkpoint.errors import FormatError
from checkpoint.format.box import Box, boxes_of_run, split_box
from checkpoint.format.placement import (
    Only,
    Partial,
    Placement,
    Replicate,
    SectionShard,
    Shard,
    Spans,
    StridedShard,
    divide,
    length,
)

__all__ = [
    "AXES",
    "Box",
    "FlatGroup",
    "Layout",
    "Mesh",
    "Only",
    "Part",
    "Partial",
    "Placement",
    "Replicate",
    "SectionShard",
    "Shard",
    "Spread",
    "StridedShard",
    "boxes_of",
    "boxes_of_run",
    "holders_of",
    "local_shape",
    "parts_of",
    "shard_box",
    "split_box",
]

_REMEMBERED = 1024  # shapes and spreads: a model has many tensors of each
AXES = ("replica", "shard", "tensor", "pipeline", "expert", "context")  # as people name them


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks on named axes, row-major: the last axis varies fastest.

    `ranks` are the world's ranks in that order; left out, they are 0, 1, 2, ...
    """

    axes: tuple[tuple[str, int], ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names) or any(size < 1 for _, size in self.axes):
            raise FormatError(f"a mesh needs distinct axes of at least one rank each, not {self.axes}")
        if self.ranks and (len(self.ranks) != self.size or len(set(self.ranks)) != self.size):
            raise FormatError(f"a mesh {self.axes} needs {self.size} distinct ranks, not {self.ranks}")

    def __hash__(self) -> int:
        return hash((self.axes, self.ranks[:1]))  # of thousands of ranks, each time a spread is looked up

    @property
    def size(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(size for _, size in self.axes)

    @property
    def members(self) -> Sequence[int]:
        """The world's ranks, row-major."""
        return self.ranks or range(self.size)

    def place(self, rank: int) -> int:
        """Return the rank's place among the members. Raises FormatError if it is none."""
        if rank not in self.members:
            raise FormatError(f"rank {rank} is not on a mesh of {self.size} ranks {self.axes}")
        return self.members.index(rank)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Return the rank's place on each axis."""
        place, coordinates = self.place(rank), []
        for _, size in reversed(self.axes):
            place, coordinate = divmod(place, size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    def rank_at(self, coordinates: Sequence[int]) -> int:
        """Return the rank at a place on each axis."""
        place = 0
        for (_, size), coordinate in zip(self.axes, coordinates, strict=True):
            place = place * size + coordinate
        return self.members[place]

    def axis(self, name: str) -> int:
        """Return the number of the axis of this name. Raises FormatError."""
        for number, (axis, _) in enumerate(self.axes):
            if axis == name:
                return number
        raise FormatError(f"there is no axis {name!r} on the mesh {self.axes}")


@dataclass(frozen=True, slots=True)
class Spread:
    """How one tensor lies on a mesh: one placement per axis."""

    mesh: Mesh
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Tensors laid end to end in one flat buffer, which the ranks of some axes divide evenly: ZeRO, FSDP1.

    Each tensor starts at a multiple of `start_multiple` elements. Each rank's part has the same length, a
    multiple of `part_multiple`; what the tensors leave of it is padding. A tensor that a rank does not hold
    takes no room.
    """

    names: tuple[str, ...]
    axes: tuple[str, ...]
    start_multiple: int = 1
    part_multiple: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor of a state lives: one placement per mesh axis, by tensor name, and the flat groups.

    A tensor of a flat group is replicated over that group's axes here; the group divides it.
    """

    mesh: Mesh
    placements: Mapping[str, tuple[Placement, ...]]
    flats: tuple[FlatGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor, and where its holder keeps these elements, in the same row-major order.

    `local` is a box of the rank's own tensor; for a flat group it is a run of the rank's part, of one dim.
    """

    box: Box
    local: Box


def boxes_of(spread: Spread, shape: Sequence[int]) -> list[tuple[Box, ...]]:
    """Return the boxes of a tensor that each rank of the mesh holds, in the order of `mesh.members`.

    Together they cover the tensor once per replica. A rank that holds nothing has no box; one that holds
    several keeps them in this order in its own tensor (`parts_of` tells where).

    Raises FormatError if the placements do not fit the mesh or the shape.
    """
    return [tuple(part.box for part in parts) for parts in _all_parts(spread, tuple(shape))]


def parts_of(spread: Spread, shape: Sequence[int], rank: int) -> tuple[Part, ...]:
    """Return the boxes that one rank holds, each with its place in the rank's own tensor."""
    return _parts_of(spread, tuple(shape), rank)


def local_shape(spread: Spread, shape: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """Return the shape of the rank's own tensor; None if the rank has no such tensor at all."""
    region = _region(spread, tuple(shape), rank)
    return None if region is None else tuple(length(spans) for spans in region)


def holders_of(spread: Spread, shape: Sequence[int]) -> Mapping[Box, tuple[int, ...]]:
    """Return which ranks of the world hold each box: any one of them can write it.

    Raises FormatError for partial sums, which nobody holds: sum them first.
    """
    return _holders_of(spread, tuple(shape))


def shard_box(shape: Sequence[int], mesh: Mesh, placements: Sequence[Placement], rank: int) -> Box:
    """Return the one box of a tensor that a rank holds; empty if there is nothing left for it.

    Axes that shard the same dim divide it one after the other, outermost first.

    Raises FormatError if it holds several: `boxes_of` lists them.
    """
    region = _region(Spread(mesh, tuple(placements)), tuple(shape), rank)
    if region is None:
        return Box((0,) * len(shape), (0,) * len(shape))
    if any(len(spans) > 1 for spans in region):
        raise FormatError(f"rank {rank} holds several boxes of a tensor placed as {list(placements)}")
    one = [spans[0] if spans else (n, 0) for spans, n in zip(region, shape, strict=True)]
    return Box(tuple(start for start, _ in one), tuple(size for _, size in one))


Region = tuple[Spans, ...]  # per dim; None instead of one: the rank has no such tensor


@lru_cache(maxsize=_REMEMBERED)
def _region(spread: Spread, shape: tuple[int, ...], rank: int) -> Region | None:
    """Return what one rank holds: every axis in turn divides what the axes before it left."""
    _check(spread, shape)
    region: Region | None = _whole(shape)
    coordinates = spread.mesh.coordinates(rank)
    for (_, ranks), place, placement in zip(spread.mesh.axes, coordinates, spread.placements, strict=True):
        region = _cut(region, placement, ranks, place)
    return region


@lru_cache(maxsize=_REMEMBERED)
def _holders_of(spread: Spread, shape: tuple[int, ...]) -> Mapping[Box, tuple[int, ...]]:
    if any(isinstance(placement, Partial) for placement in spread.placements):
        raise FormatError(f"partial sums over {spread.mesh.axes} have no holder: reduce the tensor first")
    holders: dict[Box, list[int]] = {}
    for rank, boxes in zip(spread.mesh.members, boxes_of(spread, shape), strict=True):
        for box in boxes:
            holders.setdefault(box, []).append(rank)
    return MappingProxyType({box: tuple(ranks) for box, ranks in holders.items()})


@lru_cache(maxsize=_REMEMBERED)
def _parts_of(spread: Spread, shape: tuple[int, ...], rank: int) -> tuple[Part, ...]:
    region = _region(spread, shape, rank)
    return () if region is None else _parts(region)


@lru_cache(maxsize=_REMEMBERED)
def _all_parts(spread: Spread, shape: tuple[int, ...]) -> tuple[tuple[Part, ...], ...]:
    """Return what each rank holds, row-major; ranks that hold the same share one value."""
    _check(spread, shape)
    regions: list[Region | None] = [_whole(shape)]
    for (_, ranks), placement in zip(spread.mesh.axes, spread.placements, strict=True):
        divided = {
            name: [_cut(one, placement, ranks, place) for place in range(ranks)]
            for name, one in _distinct(regions).items()
        }
        regions = [cut for one in regions for cut in divided[id(one)]]
    parts = {name: _parts(one) if one is not None else () for name, one in _distinct(regions).items()}
    return tuple(parts[id(one)] for one in regions)


def _distinct(regions: list[Region | None]) -> dict[int, Region | None]:
    """Return every region once, by identity: copies on many ranks are one object."""
    return {id(one): one for one in regions}


def _whole(shape: tuple[int, ...]) -> Region:
    return tuple(((0, size),) if size else () for size in shape)


def _cut(region: Region | None, placement: Placement, ranks: int, place: int) -> Region | None:
    if region is None:
        return None
    match placement:
        case Only(coordinates):
            return region if place in coordinates else None
        case Shard(dim) | StridedShard(dim) | SectionShard(dim):
            return (*region[:dim], divide(region[dim], placement, ranks, place), *region[dim + 1 :])
        case Replicate() | Partial():
            return region


def _check(spread: Spread, shape: tuple[int, ...]) -> None:
    axes, placements = spread.mesh.axes, spread.placements
    if len(placements) != len(axes):
        raise FormatError(f"{len(placements)} placements for the {len(axes)} axes of {axes}")
    for (axis, ranks), placement in zip(axes, placements, strict=True):
        match placement:
            case Shard(dim) | StridedShard(dim) | SectionShard(dim) if not 0 <= dim < len(shape):
                raise FormatError(f"axis {axis!r} shards dim {dim} of a tensor of shape {shape}")
            case StridedShard(split=split) if split < 1:
                raise FormatError(f"axis {axis!r} cannot split a dim into {split} pieces")
            case Only(coordinates) if not all(0 <= one < ranks for one in coordinates):
                raise FormatError(f"axis {axis!r} has {ranks} ranks, not all of {coordinates}")


def _parts(region: Region) -> tuple[Part, ...]:
    origins = [list(accumulate((size for _, size in spans), initial=0)) for spans in region]
    parts = []
    for picks in product(*(range(len(spans)) for spans in region)):
        chosen = [spans[pick] for spans, pick in zip(region, picks, strict=True)]
        size = tuple(size for _, size in chosen)
        local = tuple(origin[pick] for origin, pick in zip(origins, picks, strict=True))
        parts.append(Part(Box(tuple(start for start, _ in chosen), size), Box(local, size)))
    return tuple(parts)
