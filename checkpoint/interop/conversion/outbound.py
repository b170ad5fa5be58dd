"""Foreign tensors of an export as a writer reads them: their boxes are filled from global ones."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from checkpoint.engine.pipeline import fan_out
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.interop.conversion.casting import cast
from checkpoint.interop.conversion.contract import READ_BYTES, Array, ConversionSettings, GlobalTensors
from checkpoint.interop.conversion.moving import is_turned, source_part, target_part, turned_back
from checkpoint.interop.formats.contract import About
from checkpoint.interop.moves import Foreign, Move, Plan

_NUM_THREADS = 2
BAND_BYTES = 8 << 20
NUM_BANDS = 4  # of a thread: what is read, turned, cast, and on its way into a file


class Outbound:
    """The foreign tensors of a plan, as a writer reads them: their boxes are filled from global tensors.

    `widths` are the bytes of an element of each global tensor before it is cast, if any is.
    """

    def __init__(
        self,
        source: GlobalTensors,
        plan: Plan,
        about: About,
        *,
        widths: Sequence[int] = (),
    ) -> None:
        self.about = about
        self._widths = widths or [itemsize(one.dtype) for one in plan.tensors]
        self.tensors: Sequence[Foreign] = plan.foreign
        self._source = source
        self._plan = plan
        self._moves: dict[int, list[Move]] = {}
        for move in plan.moves:
            self._moves.setdefault(move.source, []).append(move)
        self.turned = frozenset(move.source for move in plan.moves if is_turned(move))

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of a foreign tensor; padding is zero. Large boxes take several threads."""
        return self.filled(number, box, _NUM_THREADS)

    def filled(self, number: int, box: Box, num_threads: int) -> Array:
        """Return the bits of a box, filled by so many threads."""
        dtype = self.tensors[number].dtype
        if (whole := self._whole(number, box)) is not None:
            return whole
        found: Array = np.zeros(box.size, dtype_of(dtype).carrier)
        groups = self._groups(number, box)
        for _ in fan_out(lambda parts: self._fill(number, parts, box, found), groups, num_threads):
            pass
        return found

    def _groups(self, number: int, box: Box) -> list[list[tuple[Move, Box]]]:
        """Return the parts of a box that each thread fills at a time, with the moves that they are of.

        They are cut as they lie in the source, whose chunks each of many parts would read again.
        """
        moves = self._moves.get(number, ())
        parts = [(move, part) for move in moves if (part := move.source_box.intersect(box)) is not None]
        if number in self.turned:
            return [
                [(move, source_part(move, band))]
                for move, part in parts
                for band in split_box(target_part(move, part), self._widths[move.target], BAND_BYTES)
            ]
        wide = max((self._widths[move.target] for move, _ in parts), default=1)
        bands = split_box(box, wide, BAND_BYTES)
        if len(bands) <= 1:
            return [parts]
        cut = ([(move, part.intersect(band)) for move, part in parts] for band in bands)
        return [[(move, part) for move, part in some if part is not None] for some in cut]

    def _whole(self, number: int, box: Box) -> Array | None:
        """Return a box that is one of a global tensor, and not cast, as it was read: without a copy.

        A large one that is turned would be copied, beside all that was read.
        """
        moves, width = self._moves.get(number, ()), itemsize(self.tensors[number].dtype)
        if len(moves) != 1 or moves[0].source_box.intersect(box) != box:
            return None
        move = moves[0]
        is_copied = number in self.turned and box.numel * width > BAND_BYTES
        if is_copied or self._widths[move.target] != width:
            return None
        bits = self._source.read([(move.target, target_part(move, box))])[0]
        made = cast(bits, self._plan.tensors[move.target].dtype, self.tensors[number].dtype)
        return np.ascontiguousarray(turned_back(move, made, box)).reshape(box.size)

    def _fill(self, number: int, parts: Sequence[tuple[Move, Box]], box: Box, found: Array) -> None:
        dtype = self.tensors[number].dtype
        bits = self._source.read([(move.target, target_part(move, part)) for move, part in parts])
        for (move, part), values in zip(parts, bits, strict=True):
            made = cast(values, self._plan.tensors[move.target].dtype, dtype)
            found[part.within(box)] = turned_back(move, made, part)


class Staged:
    """Contents of which some tensors lie otherwise in their source, where each row here is a column.

    A row of these costs as much reading as all the rows that fit into the budget beside it, so they are read
    together, and kept for as long as a writer asks for the next of them. Thread-safe.
    """

    def __init__(self, inner: Outbound, settings: ConversionSettings) -> None:
        self.about = inner.about
        self.tensors: Sequence[Foreign] = inner.tensors
        self._inner = inner
        # Of as many tensors at a time, or of one and what comes next.
        self._num_threads, self._num_kept = _NUM_THREADS, settings.num_workers + 1
        if is_tight(settings):
            self._num_threads, self._num_kept = 1, 2
        self._stage_bytes = staging_bytes(settings) // self._num_kept
        self._stages: OrderedDict[tuple[int, int], tuple[Box, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box."""
        if number not in self._inner.turned or box.is_empty:
            return self._inner.read(number, box)
        tensor = self.tensors[number]
        rows = self._num_rows(tensor)
        if box.size[0] >= rows:
            return self._inner.read(number, box)
        found: Array = np.empty(box.size, dtype_of(tensor.dtype).carrier)
        with self._lock:
            for stage in range(box.start[0] // rows, (box.stop[0] - 1) // rows + 1):
                whole, bits = self._stage(number, stage, rows)
                part = whole.intersect(box)
                if part is not None:
                    found[part.within(box)] = bits[part.within(whole)]
        return found

    def _num_rows(self, tensor: Foreign) -> int:
        row_bytes = max(1, Box.whole(tensor.shape[1:]).numel * itemsize(tensor.dtype))
        return max(1, self._stage_bytes // row_bytes)

    def _stage(self, number: int, stage: int, rows: int) -> tuple[Box, Array]:
        """Return the rows of a stage, read now if they are not at hand."""
        if (number, stage) not in self._stages:
            while len(self._stages) >= self._num_kept:
                self._stages.popitem(last=False)
            shape = self.tensors[number].shape
            count = min(rows, shape[0] - stage * rows)
            box = Box((stage * rows, *(0 for _ in shape[1:])), (count, *shape[1:]))
            self._stages[number, stage] = box, self._inner.filled(number, box, self._num_threads)
        self._stages.move_to_end((number, stage))
        return self._stages[number, stage]


def working_bytes(settings: ConversionSettings) -> int:
    """Return the most that threads hold: each a block, and what that is made of."""
    return settings.num_workers * (READ_BYTES + NUM_BANDS * BAND_BYTES)


def staging_bytes(settings: ConversionSettings) -> int:
    """Return what a budget has for rows that are read together: what threads leave, or one of them."""
    return max(3 * settings.budget_bytes // 8, settings.budget_bytes - working_bytes(settings))


def is_tight(settings: ConversionSettings) -> bool:
    """Whether several threads that read rows together would not leave room for these."""
    return working_bytes(settings) + staging_bytes(settings) > settings.budget_bytes
