"""Fingerprints of a foreign checkpoint, taken of what is read of it for something else, in the same pass.

They are of the foreign tensors as their reader returns them, share by share as the plan places them: nothing
that puts global tensors together has a part in it.
"""

import threading
from collections.abc import Collection, Sequence
from dataclasses import replace

from checkpoint.engine.regions import Regions, find_uncovered, padded
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.interop.conversion.assembling import prove_from_sources
from checkpoint.interop.conversion.contract import Array, ConversionSettings
from checkpoint.interop.conversion.moving import target_part, turned
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.moves import Foreign, How, Move, Plan


class Marked:
    """A foreign checkpoint that remembers the fingerprint of every share that was read. Thread-safe."""

    def __init__(self, foreign: Contents, plan: Plan) -> None:
        self.about = foreign.about
        self.tensors: Sequence[Foreign] = foreign.tensors
        self._foreign = Counted(foreign)
        self._plan = plan
        self._moves: dict[int, list[Move]] = {}
        self._unmarked = {move.target for move in plan.moves if not _keeps_values(plan, move)}
        for move in plan.moves:
            if move.target not in self._unmarked:
                self._moves.setdefault(move.source, []).append(move)
        self._marks: dict[tuple[int, Box], int] = {}

    @property
    def num_read_bytes(self) -> int:
        """How many bytes of tensors were read so far, for whatever reason."""
        return self._foreign.num_bytes

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box. Raises Mismatch if they are others than they were before."""
        bits = self._foreign.read(number, box)
        for move in self._moves.get(number, ()):
            part = move.source_box.intersect(box)
            if part is not None:
                self._mark(move, part, bits[part.within(box)])
        return bits

    def fingerprints(self, names: Collection[str], settings: ConversionSettings) -> dict[str, int]:
        """Return those of these global tensors; what was not read, or not whole, is read for it now.

        Raises Mismatch if copies of a tensor differ.
        """
        known = self._complete()
        wanted = {number for number, spec in enumerate(self._plan.tensors) if spec.name in names}
        moves = tuple(one for one in self._plan.moves if one.target in wanted and one.target not in known)
        rest = prove_from_sources(replace(self._plan, moves=moves), self._foreign, settings)
        return rest | {self._plan.tensors[number].name: mark for number, mark in known.items()}

    def _mark(self, move: Move, part: Box, bits: Array) -> None:
        spec, place = self._plan.tensors[move.target], target_part(move, part)
        mark = fingerprint(turned(move, bits, place), spec.dtype, spec.shape, place)
        if self._marks.setdefault((move.target, place), mark) != mark:
            raise Mismatch(
                f"{self._plan.foreign[move.source]} changed while it was being read: is it in use?"
            )

    def _complete(self) -> dict[int, int]:
        """Return the fingerprints of the tensors, by number, of which each element was read exactly once."""
        shares: dict[int, list[Box]] = {}
        sums: dict[int, int] = {}
        for (target, place), mark in self._marks.items():
            shares.setdefault(target, []).append(place)
            sums[target] = (sums.get(target, 0) + mark) % MODULUS
        shapes = [spec.shape for spec in self._plan.tensors]
        while shares:
            owners = [target for target, places in shares.items() for _ in places]
            regions = Regions.of([place for places in shares.values() for place in places], owners)
            wide = padded(shapes, max(map(len, shapes)), 1)
            wrong = find_uncovered(regions, wide, list(shares))
            if wrong is None:
                break
            del shares[wrong]
        return {target: sums[target] for target in shares}


class Counted:
    """A foreign checkpoint, and how many bytes were read of it."""

    def __init__(self, inner: Contents) -> None:
        self.about = inner.about
        self.tensors: Sequence[Foreign] = inner.tensors
        self.num_bytes = 0
        self._inner = inner
        self._lock = threading.Lock()

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box."""
        bits = self._inner.read(number, box)
        with self._lock:
            self.num_bytes += bits.nbytes
        return bits


def planned_bytes(plan: Plan, twice: Collection[int]) -> list[int]:
    """Return how many bytes are read for each global tensor, some with a second pass to prove them."""
    found = [0] * len(plan.tensors)
    for move in plan.moves:
        times = (move.how is not How.SAME) + (move.target in twice)
        found[move.target] += times * move.source_box.numel * itemsize(plan.foreign[move.source].dtype)
    return found


def _keeps_values(plan: Plan, move: Move) -> bool:
    """Whether a move alone says what its share of the target is: neither a copy nor a change of values."""
    is_same_dtype = plan.foreign[move.source].dtype == plan.tensors[move.target].dtype
    return move.how is How.FILL and is_same_dtype
