"""Who writes which box, and which stored boxes fill a wanted one. Pure, decided before anything moves."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.errors import Incomplete
from checkpoint.format.dtypes import itemsize
from checkpoint.format.layout import Box, split_box
from checkpoint.format.records import MAX_CHUNK_BYTES


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


@dataclass(frozen=True, slots=True)
class Copy:
    """Fill `box` of wanted box number `wanted` from stored chunk number `chunk`. All boxes are global."""

    chunk: int
    wanted: int
    box: Box


def plan_save(tensors: Sequence[TensorSpec], num_writers: int) -> list[Write]:
    """Deal the chunks of a state that every one of `num_writers` ranks holds in full."""
    everyone = tuple(range(num_writers))
    whole = [Piece(index, Box.whole(spec.shape), everyone) for index, spec in enumerate(tensors)]
    return deal_pieces(tensors, whole)


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


def plan_restore(stored: Sequence[Box], wanted: Sequence[Box]) -> list[Copy]:
    """List the copies that fill every wanted box of one tensor; raise Incomplete if the chunks leave a hole.

    The stored boxes do not overlap each other (`check_cover`, at commit), so counting elements finds every
    hole.
    """
    copies = []
    for number, box in enumerate(wanted):
        missing = box.numel
        for chunk, source in enumerate(stored):
            common = source.intersect(box)
            if common is not None and not common.is_empty:
                copies.append(Copy(chunk, number, common))
                missing -= common.numel
        if missing > 0:
            raise Incomplete(f"the chunks leave {missing} of {box.numel} elements of box {box} unfilled")
    return copies


def check_cover(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Prove that boxes cover a tensor exactly once; raise Incomplete naming the tensor if they do not.

    Boxes inside the tensor, no two of which overlap, with as many elements as it has, cover it. Overlaps are
    sought by a sweep along the first dimension.
    """
    whole = Box.whole(shape)
    for box in boxes:
        if len(box.size) != len(shape) or not _is_inside(box, whole):
            raise Incomplete(f"tensor {name!r} of shape {list(shape)} has a chunk outside of it: {box}")
    covered = sum(box.numel for box in boxes)
    if covered != whole.numel or _has_overlap([box for box in boxes if not box.is_empty]):
        raise Incomplete(
            f"the chunks of tensor {name!r} hold {covered} of its {whole.numel} elements, "
            "or some of them twice: each element has to be written exactly once"
        )


def _is_inside(box: Box, whole: Box) -> bool:
    return all(start >= 0 for start in box.start) and all(
        stop <= end for stop, end in zip(box.stop, whole.stop, strict=True)
    )


def _has_overlap(boxes: list[Box]) -> bool:
    active: list[Box] = []
    for box in sorted(boxes, key=lambda one: one.start):
        if box.start:
            active = [other for other in active if other.stop[0] > box.start[0]]
        if any((common := other.intersect(box)) is not None and not common.is_empty for other in active):
            return True
        active.append(box)
    return False


def group_by_tensor(tensors: Sequence[int]) -> Mapping[int, list[int]]:
    """Map each tensor number to the positions at which it occurs."""
    groups: dict[int, list[int]] = {}
    for position, tensor in enumerate(tensors):
        groups.setdefault(tensor, []).append(position)
    return groups
