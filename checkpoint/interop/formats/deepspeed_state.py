"""What readers of DeepSpeed collect: tensors in tiles, and weights that are the rounded masters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.contract import Array
from checkpoint.interop.formats.extents import Extent, contiguous
from checkpoint.interop.formats.rounding import round_bits
from checkpoint.interop.formats.tiles import Tile, Tiled
from checkpoint.interop.moves import Foreign


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight that no file holds: the master of this number, in another dtype."""

    name: str
    dtype: str
    master: int


class ZeroCheckpoint:
    """Tensors that lie in tiles, and such that are others' values rounded to 16 bits."""

    def __init__(self, tiled: Tiled, rounded: Sequence[Rounded]) -> None:
        self._tiled = tiled
        self.about = tiled.about
        self._masters = [one.master for one in rounded]
        copies = [replace(tiled.tensors[one.master], name=one.name, dtype=one.dtype) for one in rounded]
        self.tensors: tuple[Foreign, ...] = (*tiled.tensors, *copies)

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of a tensor, row by row, in its dtype's carrier type."""
        stored = len(self._tiled.tensors)
        if number < stored:
            return self._tiled.read(number, box)
        return round_bits(self._tiled.read(self._masters[number - stored], box), self.tensors[number].dtype)

    def settle(self) -> None:
        """See that what was read is what checksums in the files say."""
        self._tiled.settle()


@dataclass(slots=True)
class Collected:
    """What the files of all model-parallel ranks hold."""

    tensors: list[Foreign] = field(default_factory=list)
    tiles: list[list[Tile]] = field(default_factory=list)
    rounded: list[Rounded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: dict[tuple[str, int], tuple[int, Box]] = field(default_factory=dict)  # see `seen_in`

    def add(self, tensor: Foreign, tiles: list[Tile]) -> None:
        """Add a tensor and where it lies."""
        self.tensors.append(tensor)
        self.tiles.append(tiles)

    def seen_in(self, file: str, group: int, box: Box) -> None:
        """Keep the largest box of the last tensor, a master, that lies in a file's partition of a group."""
        known = self.parts.get((file, group))
        if known is None or known[1].numel < box.numel:
            self.parts[file, group] = (len(self.tensors) - 1, box)


def run_of(find: Callable[[], Extent], start: int, size: tuple[int, ...]) -> Extent:
    """Return where a run of a flat partition lies, as a tensor of its own."""
    flat = find()
    offset = flat.offset + start * itemsize(flat.dtype)
    return Extent(flat.path, offset, flat.dtype, size, contiguous(size))
