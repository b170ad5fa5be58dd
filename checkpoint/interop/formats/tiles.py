"""A foreign tensor that lies in several places: its boxes cover it exactly once, and any box can be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint.engine.regions import Regions, find_outside, find_uncovered, padded
from checkpoint.errors import Corrupt, Incomplete
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of
from checkpoint.interop.formats.contract import About, Array
from checkpoint.interop.formats.extents import Extent, read_box
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

_EXACT_IN_FLOAT32 = 1 << 24
_MAX_INT = 1 << 63


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of a tensor, and how to find where it lies (looked up only when it is read), or its bits."""

    box: Box
    locate: Callable[[], Extent | Array]


class Tiled:
    """A foreign checkpoint whose tensors lie in tiles: what most readers return."""

    def __init__(
        self, place: Place, about: About, tensors: Sequence[Foreign], tiles: Sequence[Sequence[Tile]]
    ) -> None:
        check_tiles(tensors, tiles, str(place))
        self.about = about
        self.tensors = tuple(tensors)
        self.place, self._tiles = place, tiles

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of a tensor, row by row, in its dtype's carrier type."""
        return _read(self.place, self.tensors[number], self._tiles[number], box)

    def settle(self) -> None:
        """See that what was read is what checksums in the files say."""
        self.place.settle()


def found(box: Box, source: Extent | Array) -> Tile:
    """Return a tile of which it is known where it lies, or what its bits are."""
    return Tile(box, lambda: source)


def held(name: str, value: float) -> tuple[Foreign, list[Tile]]:
    """Return a tensor made of a number, as old optimizers keep their steps."""
    tensor, bits = as_bits(name, value)
    return tensor, [found(Box((), ()), bits)]


def as_bits(name: str, value: float) -> tuple[Foreign, Array]:
    """Return the tensor that a number becomes, and its bits: float32 if that holds it."""
    if type(value) is int and not -_MAX_INT <= value < _MAX_INT:
        raise Corrupt(f"{name} cannot be a number of {value.bit_length()} bits")
    with np.errstate(over="ignore"):
        dtype = "float32" if float(np.float32(value)) == value else "float64"
    if type(value) is int and abs(value) > _EXACT_IN_FLOAT32:
        dtype = "int64"
    bits: Array = np.array(value, dtype).view(dtype_of(dtype).carrier)
    return Foreign(name, dtype, ()), bits


def check_tiles(tensors: Sequence[Foreign], tiles: Sequence[Sequence[Tile]], where: str) -> None:
    """See that the tiles of every tensor hold each of its elements once. Raises Incomplete naming one."""
    shapes = padded([one.shape for one in tensors], max((len(one.shape) for one in tensors), default=0), 1)
    owners = [number for number, parts in enumerate(tiles) for _ in parts]
    regions = Regions.of([tile.box for parts in tiles for tile in parts], owners)
    outside = find_outside(regions, shapes) if len(regions) else None
    if outside is not None:
        tensor = tensors[owners[outside]]
        raise Incomplete(f"{where}: a part of {tensor} lies outside of its shape {tensor.shape}")
    wrong = find_uncovered(regions, shapes, range(len(tensors))) if tensors else None
    if wrong is not None:
        boxes = [(tile.box.start, tile.box.size) for tile in tiles[wrong][:4]]
        raise Incomplete(
            f"{where}: the {len(tiles[wrong])} parts of {tensors[wrong]} do not hold each element of its "
            f"shape {tensors[wrong].shape} exactly once: is a rank's file missing, or there twice? "
            f"The first ones (start, size): {boxes}"
        )


def _read(place: Place, tensor: Foreign, tiles: Sequence[Tile], box: Box) -> Array:
    """Return the bits of a box of a tensor, row by row."""
    box.within(Box.whole(tensor.shape))
    out: Array | None = None
    for tile in tiles:
        common = tile.box.intersect(box)
        if common is None:
            continue
        source, inner = tile.locate(), common.moved(tile.box.start, (0,) * len(box.size))
        whole = Box.whole(tile.box.size)
        part = read_box(place, source, inner) if isinstance(source, Extent) else source[inner.within(whole)]
        if common == box:
            return part
        if out is None:
            out = np.empty(box.size, dtype_of(tensor.dtype).carrier)
        out[common.within(box)] = part
    return np.empty(box.size, dtype_of(tensor.dtype).carrier) if out is None else out
