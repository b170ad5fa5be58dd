"""Foreign tensors as global ones: boxes are put together from the ranks' parts as they are asked for."""

from collections.abc import Sequence

import numpy as np
import torch

from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.tensors import torch_dtype
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.interop.conversion.casting import cast
from checkpoint.interop.conversion.contract import Array, Wish
from checkpoint.interop.conversion.moving import source_part, turned
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
        if len(moves) == 1 and moves[0].how is How.FILL and moves[0].target_box.intersect(box) == box:
            return self._filled(moves[0], box)
        found: Array = np.zeros(box.size, dtype_of(spec.dtype).carrier)
        sums: dict[Box, list[Array]] = {}
        for move in moves:
            part = move.target_box.intersect(box)
            if part is None:
                continue
            if move.how is How.MEAN:
                bits = turned(move, self._foreign.read(move.source, source_part(move, part)), part)
                old = self._plan.foreign[move.source].dtype
                sums.setdefault(part, []).append(cast(bits, old, "float64"))
            else:
                found[part.within(box)] = self._filled(move, part)
        for part, summands in sums.items():
            found[part.within(box)] = cast(_mean(summands), "float64", spec.dtype)
        return found

    def _filled(self, move: Move, part: Box) -> Array:
        """Return the bits that a move has for a part of its target box."""
        bits = turned(move, self._foreign.read(move.source, source_part(move, part)), part)
        return cast(bits, self._plan.foreign[move.source].dtype, self._plan.tensors[move.target].dtype)


def _mean(summands: Sequence[Array]) -> Array:
    values = torch.stack([torch.from_numpy(one.view("i8")).view(torch_dtype("float64")) for one in summands])
    return values.mean(dim=0).view(torch.int64).numpy().view("<u8")
