"""Where the rows of many chunks lie: in their files, in the memory they go to, and in their tensors. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoint.engine.parts import Stock
from checkpoint.engine.regions import Column, Meetings, Regions
from checkpoint.engine.rows import LOT, Lots
from checkpoint.engine.targets import Target
from checkpoint.format.dtypes import itemsize
from checkpoint.format.pack import Described

_SHORTEST_BYTES = 1 << 10  # of rows with gaps: a call for each shorter one costs more than reading the gaps


@dataclass(frozen=True, slots=True)
class Copying:
    """What goes where: each of the copies is of a chunk of the stock, and goes to target `wanted[i]`."""

    stock: Stock
    copies: Meetings
    wanted: Column
    targets: Sequence[Target]
    tensors: Sequence[Described]


def lay_out(copying: Copying) -> tuple[Lots, NDArray[np.bool_]]:
    """Return a lot for each copy, without its file, and which of them are worth to be read so.

    They are worth it if their bytes are one row, or rows that are not side by side in the file, all of them
    as far from each other.
    """
    stock, wanted, targets, tensors = copying.stock, copying.wanted, copying.targets, copying.tensors
    common, chunks = copying.copies.common, copying.copies.left
    num_dims = max(common.sizes.shape[1], stock.boxes.sizes.shape[1])
    common, boxes = common.widened(num_dims), stock.boxes.take(chunks).widened(num_dims)
    sizes = np.array([itemsize(one.dtype) for one in tensors], np.int64)[common.tensors]
    addresses, strides, starts = _memories(targets, num_dims)
    where = (
        (_steps(boxes.sizes, sizes), boxes.starts),
        (strides[wanted], starts[wanted]),
        (_tensor_steps(common, tensors), np.zeros_like(common.starts)),
    )
    lots = np.zeros(len(chunks), LOT)
    is_even = _cut_rows(lots, common.sizes, sizes, [steps for steps, _ in where])
    for name, (steps, begin) in zip(("offset", "address", "first"), where, strict=True):
        lots[name] = ((common.starts - begin) * steps).sum(axis=1)
    lots["offset"] += stock.rows["offset"][chunks].astype(np.int64)
    lots["address"] += addresses[wanted]
    is_one = lots["num_rows"] == 1
    has_gaps = (lots["step"] > lots["row_bytes"]) & (lots["row_bytes"] >= _SHORTEST_BYTES)
    return lots, is_even & (addresses[wanted] != 0) & (is_one | has_gaps)


def bytes_of(lots: Lots) -> Column:
    """Return how many bytes each lot has."""
    found: Column = lots["num_rows"] * lots["row_bytes"]
    return found


def begins_of(boxes: Regions, tensors: Sequence[Described]) -> Column:
    """Return with which byte of its tensor each box begins."""
    begins: Column = (boxes.starts * _tensor_steps(boxes, tensors)).sum(axis=1)
    return begins


def _tensor_steps(boxes: Regions, tensors: Sequence[Described]) -> Column:
    """Return how many bytes lie between neighbours of each dim, in the tensor of each box."""
    num_dims = boxes.starts.shape[1]
    shapes, sizes = np.ones((len(tensors), num_dims), np.int64), np.ones(len(tensors), np.int64)
    for number in np.unique(boxes.tensors).tolist():
        shapes[number, : len(tensors[number].shape)] = tensors[number].shape
        sizes[number] = itemsize(tensors[number].dtype)
    return _steps(shapes[boxes.tensors], sizes[boxes.tensors])


def _memories(targets: Sequence[Target], num_dims: int) -> tuple[Column, Column, Column]:
    """Return where targets lie: their addresses, 0 for those in no memory of this host, steps and starts."""
    addresses = np.zeros(len(targets), np.int64)
    strides, starts = np.zeros((2, len(targets), num_dims), np.int64)
    for number, target in enumerate(targets):
        if target.is_array:
            addresses[number], steps = target.place()
            strides[number, : len(steps)] = steps
            starts[number, : len(steps)] = target.box.start
    return addresses, strides, starts


def _steps(sizes: Column, itemsizes: Column) -> Column:
    """Return how many bytes lie between neighbours of each dim, in boxes stored row by row."""
    steps = np.ones_like(sizes)
    steps[:, :-1] = np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
    return steps * itemsizes[:, None]


def _cut_rows(lots: Lots, sizes: Column, itemsizes: Column, places: Sequence[Column]) -> NDArray[np.bool_]:
    """Find the longest rows that lie in one stretch in all places; tell where all are as far apart."""
    fields = ("step", "stride", "pitch")
    row_bytes, num_rows = itemsizes.copy(), np.ones(len(lots), np.int64)
    is_even, is_row = np.ones((2, len(lots)), np.bool_)
    for dim in reversed(range(sizes.shape[1])):
        size, steps = sizes[:, dim], [place[:, dim] for place in places]
        is_alone = size == 1
        is_row &= is_alone | np.logical_and.reduce([step == row_bytes for step in steps])
        row_bytes = np.where(is_row, row_bytes * size, row_bytes)
        is_first = ~is_row & ~is_alone & (num_rows == 1)
        is_next = ~is_row & ~is_alone & ~is_first
        for name, step in zip(fields, steps, strict=True):
            is_even &= ~is_next | (lots[name] * num_rows == step)
            lots[name] = np.where(is_first, step, lots[name])
        num_rows = np.where(is_row, num_rows, num_rows * size)
    lots["row_bytes"], lots["num_rows"] = row_bytes, num_rows
    return is_even
