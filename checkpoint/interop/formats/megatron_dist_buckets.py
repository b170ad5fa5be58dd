"""A distributed optimizer's states as `dp_reshardable` keeps them: flat buckets of each model rank.

In a bucket lie a rank's parameters in the reverse of the model's order, each begun at a multiple of 64
elements. Which they are follows from the ranks that there were, and from the parts of the weights that each
wrote; that it is so is seen in the masters, which rounded are the weights.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.box import Box, boxes_of_run
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.contract import Array
from checkpoint.interop.formats.extents import Extent, contiguous
from checkpoint.interop.formats.masters import is_rounded
from checkpoint.interop.formats.megatron_dist_ranks import TIED, Kind, Ranks, Share, has_copy, order_of
from checkpoint.interop.formats.tiles import Tile, Tiled
from checkpoint.interop.moves import Foreign

_BUCKET = re.compile(
    r"(?:chained_([01])\.)?optimizer\.distributed\.dp_group_idx_([0-9]+)\.gbuf_idx_([0-9]+)\.dtype_.*\.bucket_idx_([0-9]+)"
    r"\.(param|exp_avg|exp_avg_sq)"
)
_STATES = {"param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ALIGNMENT = 64  # elements

_Buckets = dict[int, dict[str, int]]  # by bucket and state: numbers of flat tensors
Table = dict[int, dict[int, _Buckets]]  # by model rank and virtual stage, of one optimizer
Parts = tuple[Foreign, list[Tile]]


def is_bucket(key: str) -> bool:
    """Tell whether a key holds a bucket's state."""
    return _BUCKET.fullmatch(key) is not None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A rank's part of a weight: boxes end to end. A copy is looked for, and another rank's is taken."""

    number: int
    boxes: tuple[Box, ...]
    is_copy: bool

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return sum(box.numel for box in self.boxes)


class Buckets:
    """The model as a world of one rank has it, the parts that ranks wrote of it, and the flat tensors."""

    def __init__(
        self,
        model: Tiled,
        tiles: Sequence[Sequence[Tile]],
        flats: Tiled,
        flat_tiles: Sequence[Sequence[Tile]],
    ) -> None:
        self._model, self._flats, self._flat_tiles = model, flats, flat_tiles
        self._boxes = [sorted({tile.box for tile in parts}, key=lambda box: box.start) for parts in tiles]

    def states(self, ranks: Ranks) -> Iterator[Parts]:
        """Yield masters and moments. Raises Corrupt naming a master that is not there, Unsupported."""
        tables = self._tables()
        if sorted(tables) != list(range(len(tables))):
            raise Unsupported(f"there are only those of the optimizer {sorted(tables)} of a chain")
        kinds = [Kind.DENSE, Kind.EXPERTS] if len(tables) > 1 else [Kind.ALL]
        found: dict[tuple[str, int], list[Tile]] = {}
        for link, kind in enumerate(kinds):
            spread = ranks.of(kind)
            if sorted(tables[link]) != list(range(spread.num_models)):
                raise Unsupported(f"there are buckets of the model ranks {sorted(tables[link])}")
            for rank, chunked in sorted(tables[link].items()):
                if sorted(chunked) != list(range(ranks.chunks)):
                    raise Unsupported(
                        f"there are buckets of the virtual stages {sorted(chunked)}, of {ranks.chunks}"
                    )
                for chunk, buckets in chunked.items():
                    pieces = self._pieces(spread.share(rank, chunk, kind))
                    for piece, bucket, start in self._places(rank, pieces, buckets):
                        self._take(found, piece, buckets[bucket], start)
        for (state, number), parts in found.items():
            tensor = self._model.tensors[number]
            yield Foreign(f"optimizer.{state}.{tensor.name}", "float32", tensor.shape), parts

    def _take(
        self, found: dict[tuple[str, int], list[Tile]], piece: _Piece, bucket: Mapping[str, int], start: int
    ) -> None:
        """Add where the states of a part lie; those of a copy are there already."""
        for key, state in _STATES.items() if not piece.is_copy else ():
            reached = start
            for box in piece.boxes:
                found.setdefault((state, piece.number), []).extend(self._run(bucket[key], reached, box))
                reached += box.numel

    def _tables(self) -> dict[int, Table]:
        """Return what each optimizer of the chain has, by its number there."""
        found: dict[int, Table] = {}
        for number, tensor in enumerate(self._flats.tensors):
            match = _BUCKET.fullmatch(tensor.name)
            if match is None or len(tensor.shape) != 1 or tensor.dtype != "float32":
                raise Unsupported(
                    f"{tensor.name!r} is {tensor.dtype} of shape {tensor.shape}, of an unknown kind"
                )
            link, rank, chunk, bucket = (int(text or 0) for text in match.groups()[:4])
            chunked = found.setdefault(link, {}).setdefault(rank, {})
            chunked.setdefault(chunk, {}).setdefault(bucket, {})[match[5]] = number
        for table in found.values():
            for rank, chunked in table.items():
                for buckets in chunked.values():
                    self._check(rank, buckets)
        return found

    def _check(self, rank: int, buckets: _Buckets) -> None:
        """See that none of a rank's buckets is missing, or shorter in one state. Raises Corrupt."""
        if sorted(buckets) != list(range(len(buckets))):
            raise Corrupt(f"the model rank {rank} has the buckets {sorted(buckets)} of its optimizer only")
        for states in buckets.values():
            shapes = {self._flats.tensors[number].shape for number in states.values()}
            if len(shapes) != 1 or len(states) != len(_STATES):
                raise Corrupt(f"the buckets of the model rank {rank} are not all of one length")

    def _pieces(self, share: Share) -> list[_Piece]:
        """Return a rank's parts of its weights, in the order in which its model has them."""
        names = [one.name for one in self._model.tensors]
        tensor = (share.tensor, share.tensors)
        pieces = [self._piece(number, tensor) for number in order_of(names, share)]
        if has_copy(names, share):
            tied = self._piece(names.index(TIED), tensor)
            pieces.append(_Piece(tied.number, tied.boxes, is_copy=True))
        return pieces

    def _piece(self, number: int, tensor: tuple[int, int]) -> _Piece:
        rank, ranks = tensor
        boxes = self._boxes[number]
        if len(boxes) == 1:
            return _Piece(number, tuple(boxes), is_copy=rank > 0)
        if len(boxes) not in (ranks, 2 * ranks):
            raise Unsupported(
                f"{self._model.tensors[number]} is in {len(boxes)} parts of {ranks} tensor ranks"
            )
        return _Piece(number, tuple(boxes[rank::ranks]), is_copy=False)  # a gate's part, and that of up

    def _places(
        self, rank: int, pieces: Sequence[_Piece], buckets: Mapping[int, Mapping[str, int]]
    ) -> Iterator[tuple[_Piece, int, int]]:
        """Yield in which bucket each part lies, and where, told by the contents of the masters there."""
        bucket = reached = 0
        for piece in reversed(pieces):
            start = -(-reached // _ALIGNMENT) * _ALIGNMENT
            if start + piece.numel > self._numel(buckets[bucket]) and bucket + 1 < len(buckets):
                bucket, start = bucket + 1, 0
            flat, box = buckets[bucket]["param"], piece.boxes[0]
            weight = self._model.tensors[piece.number]
            if start + piece.numel > self._numel(buckets[bucket]) or not is_rounded(
                partial(self._as_box, flat, start, box), partial(self._model.read, piece.number), weight, box
            ):
                raise Corrupt(
                    f"bucket {bucket} of the model rank {rank} does not hold at {start} what {weight} "
                    "was rounded from: it is another rank's, of another step, or of another order"
                )
            reached = start + piece.numel
            yield piece, bucket, start
        if bucket + 1 != len(buckets) or reached != self._numel(buckets[bucket]):
            raise Corrupt(f"the buckets of the model rank {rank} hold more than the weights that it has")

    def _numel(self, bucket: Mapping[str, int]) -> int:
        return self._flats.tensors[bucket["param"]].shape[0]

    def _as_box(self, flat: int, start: int, whole: Box, box: Box) -> Array:
        """Return elements of a box that lies row by row in a flat tensor: those of a sample are one run."""
        inner = box.moved(whole.start, (0,) * len(box.size))
        strides = contiguous(whole.size)
        first = start + sum(at * stride for at, stride in zip(inner.start, strides, strict=True))
        return self._flats.read(flat, Box((first,), (box.numel,))).reshape(box.size)

    def _run(self, flat: int, start: int, box: Box) -> Iterator[Tile]:
        """Yield where the elements of a box lie: in one file of a rank, or in those of several."""
        for tile in self._flat_tiles[flat]:
            (begin,), (size,) = tile.box.start, tile.box.size
            first, stop = max(start, begin), min(start + box.numel, begin + size)
            reached = first - begin
            for part in boxes_of_run(box.size, first - start, stop - start) if first < stop else ():
                moved = part.moved((0,) * len(part.size), box.start)
                yield Tile(moved, partial(_part_of, tile, reached, part.size))
                reached += part.numel


def _part_of(tile: Tile, first: int, shape: tuple[int, ...]) -> Extent | Array:
    extent = tile.locate()
    if not isinstance(extent, Extent):
        part: Array = extent[first : first + math.prod(shape)].reshape(shape)
        return part
    offset = extent.offset + first * itemsize(extent.dtype)
    return Extent(extent.path, offset, extent.dtype, shape, contiguous(shape))
