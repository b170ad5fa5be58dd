"""Geometry: boxes in tensors, meshes of ranks, and which box a rank holds. Pure arithmetic."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.errors import FormatError


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a tensor: where it starts and how far it reaches, per dim. A 0-d box has one element."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.size):
            raise FormatError(f"a box needs one start and one size per dim, not {self.start} and {self.size}")
        if any(n < 0 for n in self.start) or any(n < 0 for n in self.size):
            raise FormatError(f"a box cannot start or reach below zero: start {self.start}, size {self.size}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Return the box that holds all of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """Where the box ends along each dim, exclusive."""
        return tuple(a + n for a, n in zip(self.start, self.size, strict=True))

    @property
    def numel(self) -> int:
        """How many elements the box holds."""
        return math.prod(self.size)

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no element."""
        return 0 in self.size

    def intersect(self, other: "Box") -> "Box | None":
        """Return what both boxes hold, or None if that is nothing."""
        _same_rank(self, other)
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if self.is_empty or other.is_empty or any(b <= a for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def within(self, other: "Box") -> tuple[slice, ...]:
        """Return the slices that select this box from an array that holds `other`.

        Raises FormatError if the box reaches outside of it.
        """
        _same_rank(self, other)
        if any(a < b for a, b in zip(self.start, other.start, strict=True)) or any(
            a > b for a, b in zip(self.stop, other.stop, strict=True)
        ):
            raise FormatError(f"{self} does not lie within {other}")
        return tuple(
            slice(a - origin, a - origin + n)
            for a, n, origin in zip(self.start, self.size, other.start, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks on named axes, row-major: the last axis varies fastest with the rank."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names) or any(size < 1 for _, size in self.axes):
            raise FormatError(f"a mesh needs distinct axes of at least one rank each, not {self.axes}")

    @property
    def size(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(size for _, size in self.axes)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Return the rank's place on each axis."""
        if not 0 <= rank < self.size:
            raise FormatError(f"rank {rank} is not on a mesh of {self.size} ranks {self.axes}")
        place = []
        for _, size in reversed(self.axes):
            rank, coordinate = divmod(rank, size)
            place.append(coordinate)
        return tuple(reversed(place))


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same region."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The ranks of the axis divide one dim among them, in order, as `torch.chunk` does."""

    dim: int


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank of the axis holds a summand of the same region."""


Placement = Replicate | Shard | Partial


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor of a state lives: one placement per mesh axis, by tensor name."""

    mesh: Mesh
    placements: Mapping[str, tuple[Placement, ...]]


def shard_box(shape: Sequence[int], mesh: Mesh, placements: Sequence[Placement], rank: int) -> Box:
    """Return the box of a tensor that a rank holds; empty if there is nothing left for it.

    Axes that shard the same dim divide it one after the other, outermost first. Shards are as even as
    `torch.chunk` makes them: all of ceil(n / ranks) but the last ones.
    """
    if len(placements) != len(mesh.axes):
        raise FormatError(f"{len(placements)} placements for the {len(mesh.axes)} axes of {mesh.axes}")
    start, size = [0] * len(shape), list(shape)
    for (axis, ranks), coordinate, placement in zip(
        mesh.axes, mesh.coordinates(rank), placements, strict=True
    ):
        if not isinstance(placement, Shard):
            continue
        dim = placement.dim
        if not 0 <= dim < len(shape):
            raise FormatError(f"axis {axis!r} shards dim {dim} of a tensor of shape {tuple(shape)}")
        step = -(-size[dim] // ranks)
        begin = min(step * coordinate, size[dim])
        start[dim] += begin
        size[dim] = min(step, size[dim] - begin)
    return Box(tuple(start), tuple(size))


def split_box(box: Box, itemsize: int, max_bytes: int) -> list[Box]:
    """Cut a box into boxes of at most `max_bytes`, each a contiguous run of it; an empty box into none.

    Rows of the outermost dim stay together as far as they fit; a row that does not is cut along the next dim.
    """
    if not 0 < itemsize <= max_bytes:
        raise FormatError(f"an element of {itemsize} bytes does not fit into chunks of {max_bytes} bytes")
    return [] if box.is_empty else list(_cut(box, 0, itemsize, max_bytes))


def _cut(box: Box, dim: int, itemsize: int, max_bytes: int) -> Iterator[Box]:
    num_bytes = box.numel * itemsize
    if num_bytes <= max_bytes:
        yield box
        return
    num_rows = box.size[dim]
    most = max(1, max_bytes // (num_bytes // num_rows))
    rows = -(-num_rows // -(-num_rows // most))  # the same number of cuts, evenly
    for first in range(0, num_rows, rows):
        start, size = list(box.start), list(box.size)
        start[dim] += first
        size[dim] = min(rows, num_rows - first)
        yield from _cut(Box(tuple(start), tuple(size)), dim + 1, itemsize, max_bytes)


def _same_rank(one: Box, other: Box) -> None:
    if len(one.start) != len(other.start):
        raise FormatError(f"{one} and {other} lie in tensors of different rank")
