"""Foreign tensors as global ones: boxes are put together from the ranks' parts as they are asked for."""

from collections.abc import Sequence

import numpy as np
import torch

from checkpoint.engine.plan import TensorSpec
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.interop.conversion.casting import cast, parts_of
from checkpoint.interop.conversion.contract import Array, Wish
from checkpoint.interop.conversion.moving import source_part, target_part, turned
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.moves import Foreign, How, Move, Plan


def as_they_are(foreign: Sequence[Foreign]) -> Plan:
    """Return the plan for foreign tensors that are global ones already: each fills its own."""
    specs = tuple(TensorSpec(one.name, one.dtype, one.shape) for one in foreign)
    moves = tuple(
        Move(number, box, tuple(range(len(one.shape))), number, box, How.FILL)
        for number, one in enumerate(foreign)
        if not (box := Box.whole(one.shape)).is_empty
    )
    return Plan(tuple(foreign), specs, moves, (), ())


def assembled_bytes(plan: Plan) -> int:
    """Return how many bytes of foreign tensors are read to put all global ones together."""
    moves = [move for move in plan.moves if move.how is not How.SAME]
    return sum(move.source_box.numel * itemsize(plan.foreign[move.source].dtype) for move in moves)


class Assembled:
    """The global tensors of a plan, read from the foreign checkpoint that it speaks of."""

    def __init__(self, foreign: Contents, plan: Plan) -> None:
        self.tensors: Sequence[TensorSpec] = plan.tensors
        self._foreign = foreign
        self._plan = plan
        self._moves: dict[int, list[Move]] = {}
        for move in plan.moves:
            if move.how is not How.SAME:
                self._moves.setdefault(move.target, []).append(move)

    def read(self, wishes: Sequence[Wish]) -> list[Array]:
        """Return the bits of boxes."""
        return [self._read(number, box) for number, box in wishes]

    def _read(self, number: int, box: Box) -> Array:
        spec = self._plan.tensors[number]
        moves = self._moves.get(number, ())
        if len(moves) == 1 and self._fills(moves[0], box):
            return self._filled(moves[0], box)[0]
        found: Array = np.zeros(box.size, dtype_of(spec.dtype).carrier)
        averaged: dict[Box, list[Move]] = {}
        for move in moves:
            part = move.target_box.intersect(box)
            if part is None:
                continue
            if move.how is How.MEAN:
                averaged.setdefault(part, []).append(move)
                continue
            is_cast = self._plan.foreign[move.source].dtype != spec.dtype
            for band in _bands(move, part) if is_cast else [part]:
                found[band.within(box)] = cast(*self._filled(move, band), spec.dtype)
        for part, some in averaged.items():
            for band in parts_of(part):
                found[band.within(box)] = cast(self._mean(some, band), "float64", spec.dtype)
        return found

    def _fills(self, move: Move, box: Box) -> bool:
        """Whether a move has a whole box, as it is."""
        is_as_it_is = self._plan.foreign[move.source].dtype == self._plan.tensors[move.target].dtype
        return is_as_it_is and move.how is How.FILL and move.target_box.intersect(box) == box

    def _filled(self, move: Move, part: Box) -> tuple[Array, str]:
        """Return the bits that a move has for a part of its target box, and their type."""
        bits = turned(move, self._foreign.read(move.source, source_part(move, part)), part)
        return bits, self._plan.foreign[move.source].dtype

    def _mean(self, moves: Sequence[Move], part: Box) -> Array:
        """Add doubles up, one foreign tensor after the other as they are listed, and divide the sum.

        Sums in another order have other last bits, and a proof compares all of them.
        """
        first, *others = sorted(moves, key=lambda move: move.source)
        total = _doubles(*self._filled(first, part)).clone()
        for move in others:
            total += _doubles(*self._filled(move, part))
        total /= len(moves)
        total.masked_fill_(torch.isnan(total), float("nan"))
        return total.view(torch.int64).numpy().view("<u8")


def _bands(move: Move, part: Box) -> list[Box]:
    """Cut a part of a move's target box where values are changed, as its elements lie in the source."""
    return [target_part(move, band) for band in parts_of(source_part(move, part))]


def _doubles(bits: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(cast(bits, dtype, "float64").view("i8")).view(torch.float64)
