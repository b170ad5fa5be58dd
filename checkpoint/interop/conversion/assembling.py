"""Foreign tensors as global ones: boxes are put together from the ranks' parts as they are asked for."""

from collections.abc import Sequence

import numpy as np
import torch

from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.interop.conversion.casting import cast, reference_cast
from checkpoint.interop.conversion.contract import Array, ConversionSettings, Wish
from checkpoint.interop.conversion.moving import source_part, target_part, turned
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.moves import Foreign, How, Move, Plan

_BAND_BYTES = 8 << 20


def as_they_are(foreign: Sequence[Foreign]) -> Plan:
    """Return the plan for foreign tensors that are global ones already: each fills its own."""
    specs = tuple(TensorSpec(one.name, one.dtype, one.shape) for one in foreign)
    moves = tuple(
        Move(number, box, tuple(range(len(one.shape))), number, box, How.FILL)
        for number, one in enumerate(foreign)
        if not (box := Box.whole(one.shape)).is_empty
    )
    return Plan(tuple(foreign), specs, moves, (), ())


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


def prove_from_sources(plan: Plan, foreign: Contents, settings: ConversionSettings) -> dict[str, int]:
    """Return the fingerprints of all global tensors, from the foreign side alone: share by share, in order.

    A share's elements are counted where the move says that they belong; nothing is put together. Values that
    rules cast or average are changed by the reference's code. Raises Mismatch if copies of a box differ.
    """
    shares: dict[tuple[int, Box], tuple[int, int]] = {}
    sums = dict.fromkeys((spec.name for spec in plan.tensors), 0)
    averaged: dict[tuple[int, Box], list[Move]] = {}
    plain = []
    for move in plan.moves:
        if move.how is How.MEAN:
            averaged.setdefault((move.target, move.target_box), []).append(move)
        else:
            plain.append(move)

    def share_of(moves: Sequence[Move]) -> int:
        return sum(_band_share(plan, foreign, moves, band) for band in _bands(plan, moves[0])) % MODULUS

    works = [[move] for move in plain] + list(averaged.values())
    for moves, value in zip(works, fan_out(share_of, works, settings.num_workers), strict=True):
        move = moves[0]
        name = plan.tensors[move.target].name
        known, first = shares.setdefault((move.target, move.target_box), (value, move.source))
        if known != value:
            raise Mismatch(
                f"{name!r}: the copies in {plan.foreign[first]} and {plan.foreign[move.source]} differ"
            )
        if move.how is not How.SAME:
            sums[name] = (sums[name] + value) % MODULUS
    return sums


def _bands(plan: Plan, move: Move) -> list[Box]:
    """Cut a move's source box into bands, so that little is held at a time."""
    return split_box(move.source_box, itemsize(plan.foreign[move.source].dtype), _BAND_BYTES)


def _band_share(plan: Plan, foreign: Contents, moves: Sequence[Move], band: Box) -> int:
    spec, parts = plan.tensors[moves[0].target], []
    place = target_part(moves[0], band)
    for move in moves:
        old = plan.foreign[move.source].dtype
        bits = turned(move, foreign.read(move.source, source_part(move, place)), place)
        parts.append((bits, old))
    if len(moves) == 1:
        bits, old = parts[0]
        made = bits if old == spec.dtype else reference_cast(bits, old, spec.dtype)
    else:
        values = sum(reference_cast(bits, old, "float64").view("f8") for bits, old in parts) / len(parts)
        made = reference_cast(np.asarray(values).view("<u8"), "float64", spec.dtype)
    return fingerprint(np.ascontiguousarray(made), spec.dtype, spec.shape, place)


def _mean(summands: Sequence[Array]) -> Array:
    values = torch.stack([torch.from_numpy(one.view("i8")).view(torch_dtype("float64")) for one in summands])
    return values.mean(dim=0).view(torch.int64).numpy().view("<u8")
