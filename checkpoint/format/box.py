"""Boxes: regions of a tensor, how they meet, and how they are cut. Pure arithmetic; knows no ranks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import add, gt, lt

from checkpoint.errors import FormatError


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a tensor: where it starts and how far it reaches, per dim. A 0-d box has one element."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.size):
            raise FormatError(f"a box needs one start and one size per dim, not {self.start} and {self.size}")
        if min(self.start, default=0) < 0 or min(self.size, default=0) < 0:
            raise FormatError(f"a box cannot start or reach below zero: start {self.start}, size {self.size}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Return the box that holds all of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """Where the box ends along each dim, exclusive."""
        return tuple(map(add, self.start, self.size))

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
        if any(map(lt, self.start, other.start)) or any(map(gt, self.stop, other.stop)):
            raise FormatError(f"{self} does not lie within {other}")
        return tuple(
            slice(a - origin, a - origin + n)
            for a, n, origin in zip(self.start, self.size, other.start, strict=True)
        )

    def moved(self, origin: Sequence[int], target: Sequence[int]) -> "Box":
        """Return the box in coordinates in which the point `origin` is called `target`."""
        start = tuple(a - o + t for a, o, t in zip(self.start, origin, target, strict=True))
        return Box(start, self.size)


def split_box(box: Box, itemsize: int, max_bytes: int) -> list[Box]:
    """Cut a box into boxes of at most `max_bytes`, each a contiguous run of it; an empty box into none.

    Rows of the outermost dim stay together as far as they fit; a row that does not is cut along the next dim.
    """
    if not 0 < itemsize <= max_bytes:
        raise FormatError(f"an element of {itemsize} bytes does not fit into chunks of {max_bytes} bytes")
    return [] if box.is_empty else list(_cut(box, 0, itemsize, max_bytes))


def boxes_of_run(shape: Sequence[int], first: int, stop: int) -> list[Box]:
    """Return the boxes that hold elements first, ..., stop - 1 of a raveled tensor, in that order.

    There are at most 2 * ndim - 1 of them, each contiguous in the raveled tensor.

    Raises FormatError if the run reaches outside of the tensor.
    """
    if not 0 <= first <= stop <= math.prod(shape):
        raise FormatError(f"elements {first} to {stop} do not lie in a tensor of shape {tuple(shape)}")
    return list(_run(tuple(shape), 0, first, stop, ()))


def runs_of(box: Box, shape: Sequence[int]) -> Iterator[tuple[Box, int]]:
    """Yield a box's contiguous runs in a raveled tensor of this shape: (box, its first element), in order."""
    if box.is_empty:
        return
    dim = len(shape)
    while dim and box.size[dim - 1] == shape[dim - 1]:
        dim -= 1
    outer = max(0, dim - 1)  # the first dim that is not whole is still contiguous
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    size = (*(1 for _ in range(outer)), *box.size[outer:])
    for row in product(*(range(a, a + n) for a, n in zip(box.start[:outer], box.size[:outer], strict=True))):
        start = (*row, *box.start[outer:])
        yield Box(start, size), sum(a * stride for a, stride in zip(start, strides, strict=True))


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


def _run(shape: tuple[int, ...], dim: int, first: int, stop: int, row: tuple[int, ...]) -> Iterator[Box]:
    """Yield the boxes of a run within one row: `row` fixes the dims before `dim`."""
    if stop <= first:
        return
    inner = shape[dim + 1 :]
    stride = math.prod(inner)
    if dim >= len(shape) - 1:
        yield Box((*row, first)[: len(shape)], ((1,) * len(row) + (stop - first,))[: len(shape)])
        return
    low, high = -(-first // stride), stop // stride  # rows low, ..., high - 1 are whole
    if low > high:  # begins and ends within one row
        yield from _run(shape, dim + 1, first - high * stride, stop - high * stride, (*row, high))
        return
    yield from _run(shape, dim + 1, stride - (low * stride - first), stride, (*row, low - 1))
    if high > low:
        yield Box((*row, low, *(0 for _ in inner)), (*(1 for _ in row), high - low, *inner))
    yield from _run(shape, dim + 1, 0, stop - high * stride, (*row, high))


def _same_rank(one: Box, other: Box) -> None:
    if len(one.start) != len(other.start):
        raise FormatError(f"{one} and {other} lie in tensors of different rank")
