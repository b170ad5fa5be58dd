"""Boxes of many tensors at once, as columns: which of them meet, and whether they cover. Pure arithmetic.

Time grows with the number of boxes and of pairs that meet, times a logarithm.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.format.layout import Box
from checkpoint.format.table import ChunkTable

Column = NDArray[np.int64]

_BATCH_PAIRS = 1 << 20  # how many pairs of boxes are looked at at a time
_MOST_KEY = 1 << 62


@dataclass(frozen=True, slots=True)
class Regions:
    """Row i is a box of tensor number `tensors[i]`. A dim that its tensor lacks starts at 0 and is 1 wide."""

    tensors: Column
    starts: Column
    sizes: Column

    def __len__(self) -> int:
        return len(self.tensors)

    @classmethod
    def of(cls, boxes: Sequence[Box], tensors: Sequence[int] | None = None) -> "Regions":
        """Put boxes into columns; without tensor numbers all are of tensor 0."""
        num_dims = max((len(box.size) for box in boxes), default=0)
        return cls(
            np.zeros(len(boxes), np.int64) if tensors is None else np.array(tensors, np.int64),
            padded([box.start for box in boxes], num_dims, 0),
            padded([box.size for box in boxes], num_dims, 1),
        )

    @classmethod
    def of_table(cls, table: ChunkTable) -> "Regions":
        """Put the boxes of chunks into columns."""
        num_dims = int(table.num_dims.max(initial=0))
        starts = np.zeros((len(table), num_dims), np.int64)
        sizes = np.ones((len(table), num_dims), np.int64)
        for number in np.unique(table.num_dims).tolist():
            rows = np.flatnonzero(table.num_dims == number)
            starts[rows, :number], sizes[rows, :number] = table.boxes(rows)
        return cls(table.tensor.astype(np.int64), starts, sizes)

    @property
    def stops(self) -> Column:
        """Where the boxes end along each dim, exclusive."""
        return self.starts + self.sizes

    @property
    def numels(self) -> Column:
        """How many elements each box holds."""
        numels: Column = np.prod(self.sizes, axis=1, dtype=np.int64)
        return numels

    def take(self, rows: Any) -> "Regions":
        """Return some of the boxes, by numbers or by a mask."""
        return Regions(self.tensors[rows], self.starts[rows], self.sizes[rows])

    def widened(self, num_dims: int) -> "Regions":
        """Return the same boxes in at least so many dims."""
        more = ((0, 0), (0, num_dims - self.starts.shape[1]))
        if more[1][1] <= 0:
            return self
        return Regions(self.tensors, np.pad(self.starts, more), np.pad(self.sizes, more, constant_values=1))

    def box(self, row: int, num_dims: int) -> Box:
        """Return a box, of a tensor of so many dims."""
        return Box(tuple(self.starts[row, :num_dims].tolist()), tuple(self.sizes[row, :num_dims].tolist()))


@dataclass(frozen=True, slots=True)
class Meetings:
    """Row i of `common` is what box `left[i]` of one list and box `right[i]` of another both hold."""

    left: Column
    right: Column
    common: Regions

    def __len__(self) -> int:
        return len(self.left)

    def take(self, rows: Any) -> "Meetings":
        """Return some of them, by numbers or by a mask."""
        return Meetings(self.left[rows], self.right[rows], self.common.take(rows))


def padded(rows: Sequence[Sequence[int]], num_dims: int, filler: int) -> Column:
    """Return rows of one length, made of rows of at most that length."""
    table = np.full((len(rows), num_dims), filler, np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def meet(stored: Regions, wanted: Regions) -> Meetings:
    """List what every stored and every wanted box of the same tensor have in common, by wanted box.

    Each tensor is swept along the dim in which its stored boxes begin at the most places.
    """
    num_dims = max(stored.starts.shape[1], wanted.starts.shape[1], 1)
    stored, wanted = stored.widened(num_dims), wanted.widened(num_dims)
    found = [_meetings(stored, wanted, left, right) for left, right in _candidates(stored, wanted)] or [
        _meetings(stored, wanted, np.zeros(0, np.int64), np.zeros(0, np.int64))
    ]
    columns = [
        (one.left, one.right, one.common.tensors, one.common.starts, one.common.sizes) for one in found
    ]
    left, right, *common = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Meetings(left, right, Regions(*common))


def find_outside(regions: Regions, shapes: Column) -> int | None:
    """Return the row of a box that does not lie within its tensor, if there is one; `shapes` by tensor."""
    num_dims = max(regions.starts.shape[1], shapes.shape[1])
    boxes, whole = regions.widened(num_dims), _widened_shapes(shapes, num_dims)[regions.tensors]
    is_inside = (boxes.starts >= 0) & (boxes.starts <= whole) & (boxes.sizes <= whole - boxes.starts)
    rows = np.flatnonzero(~is_inside.all(axis=1))
    return int(rows[0]) if len(rows) else None


def find_uncovered(regions: Regions, shapes: Column, tensors: Sequence[int]) -> int | None:
    """Return one of the tensors whose boxes, all inside of it, do not hold each element exactly once.

    A box is what is left of its corners: the mixed difference, over all dims, of the function that is one in
    the box and zero elsewhere is plus or minus one at its corners, and no other function of finite extent has
    the same. So boxes cover a tensor exactly once if, and only if, their corners add up to its own. Dim by
    dim, faces that touch cancel each other: a grid shrinks as it is looked at. Boxes so jagged that this
    takes much more room than they do are no cover that a saver makes, and are reported as none.
    """
    num_dims = max(regions.starts.shape[1], shapes.shape[1])
    boxes, sizes = regions.widened(num_dims), _widened_shapes(shapes, num_dims)
    numbers = np.array(tensors, np.int64)
    wholes = Regions(numbers, np.zeros((len(numbers), num_dims), np.int64), sizes[numbers])
    is_cut = ((boxes.starts != 0) | (boxes.sizes != sizes[boxes.tensors])).any(axis=0)
    most_cells = 64 * (len(boxes) + len(wholes)) + (1 << 20)

    both = _concatenated(boxes, wholes)
    weights = np.concatenate([np.ones(len(boxes), np.int64), np.full(len(wholes), -1, np.int64)])
    is_filled = (both.sizes > 0).all(axis=1)
    both, weights = both.take(is_filled), weights[is_filled]
    dims = np.flatnonzero(is_cut).tolist()
    faces, weights = _summed(
        [both.tensors, *(column[:, dim] for dim in dims for column in (both.starts, both.stops))], weights
    )
    for number in range(len(dims)):
        if 2 * len(weights) * len(faces) > most_cells:
            break
        at = number + 1  # tensor, the coordinates that are done, then starts and stops of the other dims
        done, start, stop, rest = faces[:at], faces[at], faces[at + 1], faces[at + 2 :]
        doubled = [np.concatenate([column, column]) for column in (*done, *rest)]
        doubled.insert(at, np.concatenate([start, stop]))
        faces, weights = _summed(doubled, np.concatenate([weights, -weights]))
    return int(faces[0][0]) if len(weights) else None


def _meetings(stored: Regions, wanted: Regions, left: Column, right: Column) -> Meetings:
    """Keep the pairs of boxes that meet."""
    starts = np.maximum(stored.starts[left], wanted.starts[right])
    sizes = np.minimum(stored.stops[left], wanted.stops[right]) - starts
    keep = (sizes > 0).all(axis=1)
    left, right = left[keep], right[keep]
    return Meetings(left, right, Regions(wanted.tensors[right], starts[keep], sizes[keep]))


def _candidates(stored: Regions, wanted: Regions) -> Iterator[tuple[Column, Column]]:
    """Yield rows of stored and wanted boxes that overlap along the swept dim, a batch at a time."""
    if not len(stored) or not len(wanted):
        return
    dims = _swept_dims(stored, int(max(stored.tensors.max(), wanted.tensors.max())) + 1)
    begin, end, wanted_begin, wanted_end = _places(
        [stored.tensors, stored.tensors, wanted.tensors, wanted.tensors],
        [
            _along(stored.starts, dims[stored.tensors]),
            _along(stored.stops, dims[stored.tensors]),
            _along(wanted.starts, dims[wanted.tensors]),
            _along(wanted.stops, dims[wanted.tensors]),
        ],
    )
    order = np.argsort(begin, kind="stable")
    reach = np.maximum.accumulate(end[order])
    first = np.searchsorted(reach, wanted_begin, side="right")  # nothing before reaches as far
    counts = np.maximum(np.searchsorted(begin[order], wanted_end, side="left") - first, 0)
    totals = np.cumsum(counts)
    row = 0
    while row < len(wanted):
        done = int(totals[row - 1]) if row else 0
        last = max(row + 1, int(np.searchsorted(totals, done + _BATCH_PAIRS, side="right")))
        some = counts[row:last]
        right = np.repeat(np.arange(row, last), some)
        within = np.arange(int(totals[last - 1]) - done) - np.repeat(totals[row:last] - some - done, some)
        yield order[first[right] + within], right
        row = last


def _swept_dims(stored: Regions, num_tensors: int) -> Column:
    """Return, for each tensor, the dim in which its boxes begin at the most places."""
    places = np.zeros((stored.starts.shape[1], num_tensors), np.int64)
    if len(places) > 1:
        for dim in range(len(places)):
            columns = _sorted([stored.tensors, stored.starts[:, dim]])
            places[dim] = np.bincount(columns[0][_is_new(columns)], minlength=num_tensors)
    dims: Column = places.argmax(axis=0)
    return dims


def _places(tensors: Sequence[Column], coordinates: Sequence[Column]) -> list[Column]:
    """Put (tensor, coordinate) on one line, tensor after tensor."""
    ends = np.cumsum([len(column) for column in coordinates])[:-1]
    line = np.concatenate(coordinates)
    numbers = np.concatenate(tensors)
    if (int(line.max()) + 1) * (int(numbers.max()) + 1) > _MOST_KEY:
        line = np.unique(line, return_inverse=True)[1]
    return np.split(numbers * (int(line.max()) + 1) + line, ends)


def _along(table: Column, dims: Column) -> Column:
    return table[np.arange(len(table)), dims]


def _summed(columns: list[Column], weights: Column) -> tuple[list[Column], Column]:
    """Add up the weights of equal rows, and drop the rows whose weights cancel."""
    if not len(weights):
        return columns, weights
    *columns, weights = _sorted(columns, weights)
    firsts = np.flatnonzero(_is_new(columns))
    sums = np.add.reduceat(weights, firsts)
    keep = sums != 0
    return [column[firsts[keep]] for column in columns], sums[keep]


def _sorted(columns: Sequence[Column], *others: Column) -> list[Column]:
    """Sort rows by their columns, the first one first; other columns go along."""
    limits = [int(column.max(initial=0)) + 1 for column in columns]
    if math.prod(limits) <= _MOST_KEY:
        key = columns[0]
        for column, limit in zip(columns[1:], limits[1:], strict=True):
            key = key * limit + column
        order = np.argsort(key, kind="stable")
    else:
        order = np.lexsort(columns[::-1])
    return [column[order] for column in (*columns, *others)]


def _is_new(columns: Sequence[Column]) -> NDArray[np.bool_]:
    """Tell which of some sorted rows differ from the one before."""
    is_new = np.zeros(len(columns[0]), np.bool_)
    is_new[:1] = True
    for column in columns:
        is_new[1:] |= column[1:] != column[:-1]
    return is_new


def _concatenated(one: Regions, other: Regions) -> Regions:
    return Regions(
        np.concatenate([one.tensors, other.tensors]),
        np.concatenate([one.starts, other.starts]),
        np.concatenate([one.sizes, other.sizes]),
    )


def _widened_shapes(shapes: Column, num_dims: int) -> Column:
    more = num_dims - shapes.shape[1]
    return np.pad(shapes, ((0, 0), (0, more)), constant_values=1) if more > 0 else shapes
