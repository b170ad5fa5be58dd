"""Tensors of a world of one rank, put together from the chunks of Megatron-Core's distributed checkpoints."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product

from checkpoint.errors import Corrupt, Incomplete
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.contract import Array
from checkpoint.interop.formats.dcp_files import Files
from checkpoint.interop.formats.dcp_metadata import Chunked
from checkpoint.interop.formats.extents import Extent
from checkpoint.interop.formats.megatron_dist_names import Sharded, take_apart
from checkpoint.interop.formats.tiles import Tile
from checkpoint.interop.moves import Foreign

_MAX_SLICES = 1 << 22  # layers and experts of all tensors, and of the parts that ranks wrote of them


@dataclass(slots=True)
class _Part:
    """A tensor that is being put together, of its parts end to end along the first dim."""

    dtype: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by half
    tiles: dict[str, list[Tile]] = field(default_factory=dict)

    def whole(self, name: str, where: str) -> tuple[Foreign, list[Tile]]:
        """Return the tensor and its tiles. Raises Incomplete if a half is missing."""
        if set(self.shapes) == {""}:
            return Foreign(name, self.dtype, self.shapes[""]), self.tiles[""]
        if set(self.shapes) != {"w", "v"} or self.shapes["w"] != self.shapes["v"]:
            raise Incomplete(
                f"{where} has {name!r} in halves of the shapes {self.shapes}, not two equal ones"
            )
        rows, *rest = self.shapes["w"]
        moved = [
            Tile(tile.box.moved((0,) * len(tile.box.size), (rows, *(0 for _ in rest))), tile.locate)
            for tile in self.tiles["v"]
        ]
        return Foreign(name, self.dtype, (2 * rows, *rest)), [*self.tiles["w"], *moved]


class Table:
    """The tensors of a world of one rank, as far as they have been seen."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._num_slices = 0
        self._parts: dict[str, _Part] = {}

    def add(self, key: str, one: Chunked, files: Files) -> None:
        """Add what a key holds."""
        said = take_apart(key)
        depth = said.num_counted
        if len(one.shape) < depth:
            raise Corrupt(f"{self._where} has {key!r} of the shape {one.shape}, which counts no layers")
        self._check(key, one, depth)
        for numbers in product(*(range(count) for count in one.shape[:depth])):
            self._declare(key, said, said.filled(numbers), (one.dtype, one.shape[depth:]))
        for box, item in one.chunks.items():
            tile = files.tile(key, box, item, one.dtype)
            for numbers, part in _slices(tile, depth):
                self._parts[said.filled(numbers)].tiles[said.half].append(part)

    def tensors(self) -> tuple[list[Foreign], list[list[Tile]]]:
        """Return all tensors and their tiles."""
        found = [part.whole(name, self._where) for name, part in self._parts.items()]
        return [tensor for tensor, _ in found], [tiles for _, tiles in found]

    def _check(self, key: str, one: Chunked, depth: int) -> None:
        """See that chunks lie within their tensor, and that it counts no more than a model can have."""
        counted = [one.shape[:depth], *(box.size[:depth] for box in one.chunks)]
        self._num_slices += sum(math.prod(counts) for counts in counted)
        if self._num_slices > _MAX_SLICES:
            raise Corrupt(f"{self._where} has {key!r} of the shape {one.shape}: no model has so many layers")
        whole = Box.whole(one.shape)
        for box in one.chunks:
            if len(box.size) != len(one.shape) or whole.intersect(box) != box:
                raise Corrupt(f"{self._where} has a part of {key!r} outside of its shape {one.shape}")

    def _declare(self, key: str, said: Sharded, name: str, kind: tuple[str, tuple[int, ...]]) -> None:
        dtype, shape = kind
        part = self._parts.setdefault(name, _Part(dtype))
        if said.half in part.shapes or part.dtype != dtype:
            raise Corrupt(f"{self._where} has {name!r} twice, {key!r} being one of its keys")
        part.shapes[said.half] = shape
        part.tiles[said.half] = []


def _slices(tile: Tile, depth: int) -> Iterator[tuple[tuple[int, ...], Tile]]:
    """Yield what a chunk has of each layer, and each expert, that it reaches into."""
    start, size = tile.box.start, tile.box.size
    inner = Box(start[depth:], size[depth:])
    for steps in product(*(range(count) for count in size[:depth])):
        numbers = tuple(first + step for first, step in zip(start, steps, strict=False))
        yield numbers, Tile(inner, partial(_slice, tile.locate, steps))


def _slice(locate: Callable[[], Extent | Array], steps: tuple[int, ...]) -> Extent | Array:
    extent, depth = locate(), len(steps)
    if not isinstance(extent, Extent):
        part: Array = extent[steps]
        return part
    skipped = sum(step * stride for step, stride in zip(steps, extent.strides, strict=False))
    return Extent(
        extent.path,
        extent.offset + skipped * itemsize(extent.dtype),
        extent.dtype,
        extent.shape[depth:],
        extent.strides[depth:],
    )
