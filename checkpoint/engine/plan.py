"""Who writes which box, and which stored boxes fill a wanted one. Pure, decided before anything moves."""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint.engine.regions import Meetings, Regions, find_outside, find_uncovered, meet, padded
from checkpoint.errors import Incomplete
from checkpoint.format.dtypes import itemsize
from checkpoint.format.layout import Box, split_box
from checkpoint.format.pack import Described
from checkpoint.format.records import MAX_CHUNK_BYTES
from checkpoint.format.table import ChunkTable


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor by name: its dtype (as "float32") and global shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of tensor number `tensor`, and the ranks that hold a copy of it: any one of them can write it."""

    tensor: int
    box: Box
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """One chunk: a box of tensor number `tensor` that rank `writer` stores."""

    tensor: int
    box: Box
    writer: int


def deal_pieces(tensors: Sequence[TensorSpec], pieces: Iterable[Piece]) -> list[Write]:
    """Cut pieces into chunks and give each to exactly one of its holders, balanced by bytes.

    The largest chunks are dealt first, each to the holder with the least so far (Graham's LPT rule), the
    lowest rank first among equals: the same input gives every rank the same plan. Chunks keep the order of
    the tensors.
    """
    chunks = [
        (piece, box, box.numel * itemsize(tensors[piece.tensor].dtype))
        for piece in pieces
        for box in split_box(piece.box, itemsize(tensors[piece.tensor].dtype), MAX_CHUNK_BYTES)
        if not box.is_empty
    ]
    scales: dict[tuple[int, ...], _Scale] = {}
    load: dict[int, int] = {}
    writers = [0] * len(chunks)
    for index in sorted(range(len(chunks)), key=lambda number: -chunks[number][2]):
        piece, _, num_bytes = chunks[index]
        scale = scales.setdefault(piece.holders, _Scale(piece.holders, load))
        writers[index] = scale.give(num_bytes)
    return [Write(piece.tensor, box, writers[index]) for index, (piece, box, _) in enumerate(chunks)]


class _Scale:
    """Finds the least loaded of some ranks. Loads only grow: a stale entry is too low, and is put back."""

    def __init__(self, ranks: tuple[int, ...], load: dict[int, int]) -> None:
        self._load = load
        self._heap = [(load.get(rank, 0), rank) for rank in ranks]
        heapq.heapify(self._heap)

    def give(self, num_bytes: int) -> int:
        while (entry := self._heap[0])[0] != self._load.get(entry[1], 0):
            heapq.heapreplace(self._heap, (self._load.get(entry[1], 0), entry[1]))
        rank = entry[1]
        self._load[rank] = entry[0] + num_bytes
        heapq.heapreplace(self._heap, (self._load[rank], rank))
        return rank


def plan_copies(stored: Regions, wanted: Regions) -> Meetings:
    """Return what fills wanted boxes of many tensors: region i goes from stored box `left[i]` to `right[i]`.

    Takes time in proportion to the boxes and to the regions found. Raises Incomplete if the stored boxes,
    which do not overlap, leave a hole.
    """
    copies = meet(stored, wanted)
    numels = wanted.numels
    missing = numels.copy()
    np.subtract.at(missing, copies.right, copies.common.numels)
    if (missing > 0).any():
        row = int((missing > 0).argmax())
        raise Incomplete(
            f"the chunks leave {missing[row]} of {numels[row]} elements of a wanted box of tensor number "
            f"{wanted.tensors[row]} unfilled: start {wanted.starts[row].tolist()}, "
            f"size {wanted.sizes[row].tolist()}"
        )
    return copies


def check_cover(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Prove that boxes cover a tensor exactly once; raise Incomplete naming the tensor if they do not."""
    for box in boxes:
        if len(box.size) != len(shape):
            raise Incomplete(f"tensor {name!r} of shape {list(shape)} has a chunk of another rank: {box}")
    _check_cover([TensorSpec(name, "", shape)], Regions.of(boxes), [0])


def check_chunks(
    tensors: Sequence[Described], chunks: ChunkTable, numbers: Iterable[int] | None = None
) -> None:
    """Prove that chunks cover every tensor, or those of these numbers, exactly once, and hold no others.

    Takes time in proportion to the chunks. Raises Incomplete naming a tensor that they do not.
    """
    _check_cover(
        tensors, Regions.of_table(chunks), range(len(tensors)) if numbers is None else sorted(numbers)
    )


def _check_cover(tensors: Sequence[Described], boxes: Regions, numbers: Sequence[int]) -> None:
    shapes = padded([tensor.shape for tensor in tensors], max((len(t.shape) for t in tensors), default=0), 1)
    if len(boxes) and not 0 <= int(boxes.tensors.max()) < len(tensors):
        raise Incomplete(f"there is a chunk of tensor number {boxes.tensors.max()} of {len(tensors)}")
    row = find_outside(boxes, shapes)
    if row is not None:
        tensor = tensors[int(boxes.tensors[row])]
        raise Incomplete(
            f"tensor {tensor.name!r} of shape {list(tensor.shape)} has a chunk outside of it: "
            f"start {boxes.starts[row].tolist()}, size {boxes.sizes[row].tolist()}"
        )
    number = find_uncovered(boxes, shapes, numbers)
    if number is not None:
        tensor = tensors[number]
        covered = int(boxes.take(boxes.tensors == number).numels.sum())
        raise Incomplete(
            f"the chunks of tensor {tensor.name!r} hold {covered} of its {math.prod(tensor.shape)} elements, "
            "or some of them twice: each element has to be written exactly once"
        )
