"""Parts of chunks: where little of a chunk is wanted, only the blocks that hold it are read.

Which blocks those are is arithmetic; that they can be proved alone, the sums behind the chunk tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.reading import Tally
from checkpoint.engine.regions import Column, Meetings, Regions
from checkpoint.engine.source import Source, origins_of
from checkpoint.errors import FormatError
from checkpoint.format.blocks import BLOCK_BYTES, Blocks, Sums, blocks_of, read_sums, total_of
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box
from checkpoint.format.manifest import Manifest, PackRef
from checkpoint.format.pack import Described
from checkpoint.format.table import NO_BASE
from checkpoint.store.contract import Buffer, ByteRange

_DIRECT_BYTES = 256 << 10  # smaller chunks are read together instead

Rows = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Stock:
    """What can be read, row by row: chunks, or parts of them, which have a fingerprint only."""

    rows: Rows
    boxes: Regions
    raw_bytes: Column
    is_part: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Rows, boxes: Regions, raw_bytes: Column) -> "Stock":
        """Return whole chunks."""
        return cls(rows, boxes, raw_bytes, np.zeros(len(boxes), np.bool_))

    def box(self, chunk: int) -> Box:
        """Return what is there of a chunk."""
        return self.boxes.box(chunk, int(self.rows["num_dims"][chunk]))

    def large_and_raw(self) -> NDArray[np.bool_]:
        """Tell which are worth to be read straight to where they belong."""
        rows = self.rows[: len(self.boxes)]
        is_raw: NDArray[np.bool_] = (rows["codec"] == Codec.RAW) & (rows["base"] == NO_BASE)
        return is_raw & (rows["num_bytes"] >= _DIRECT_BYTES)


@dataclass(frozen=True, slots=True)
class Part:
    """The blocks `first` to `last`, exclusive, of a chunk."""

    chunk: int
    blocks: Blocks
    first: int
    last: int


def find_parts(stock: Stock, copies: Meetings, tensors: Sequence[Described]) -> list[Part]:
    """List the chunks of which not all blocks are needed for some copies, which are sorted by chunk."""
    chunks, firsts = np.unique(copies.left, return_index=True)
    # The side that knows tensors of more dims is padded wider; these chunks' own dims come first in both.
    num_dims = min(stock.boxes.sizes.shape[1], copies.common.starts.shape[1])
    if not len(chunks) or not num_dims:
        return []
    rows, sizes = stock.rows[chunks], stock.boxes.sizes[chunks, :num_dims]
    reach = (
        np.minimum.reduceat(copies.common.starts[:, :num_dims], firsts),
        np.maximum.reduceat(copies.common.stops[:, :num_dims], firsts),
    )
    dims, everything = (sizes > 1).argmax(axis=1), np.arange(len(chunks))
    starts = stock.boxes.starts[chunks, :num_dims]
    begins, ends = (reach[0] - starts)[everything, dims], (reach[1] - starts)[everything, dims]
    raw_bytes = stock.raw_bytes[chunks]
    unwanted = raw_bytes - (ends - begins) * (raw_bytes // sizes[everything, dims])
    is_cut = (unwanted >= BLOCK_BYTES) & (rows["codec"] == Codec.RAW) & (rows["base"] == NO_BASE)
    parts = []
    for place in np.flatnonzero(is_cut).tolist():
        chunk = int(chunks[place])
        tensor = tensors[int(rows["tensor"][place])]
        blocks = blocks_of(tensor.dtype, tensor.shape, stock.box(chunk))
        if blocks is None:
            continue
        first, last = int(begins[place]) // blocks.width, -(-int(ends[place]) // blocks.width)
        if last - first < blocks.count:
            parts.append(Part(chunk, blocks, first, last))
    return parts


def cut_to_parts(stock: Stock, parts: Sequence[Part], reader: "SumsReader") -> Stock:
    """Put parts in the place of their chunks, if their sums are there and add up to what the index says.

    If they are not, the chunk is read as a whole: nothing is lost but time. Raises StoreUnavailable.
    """
    return with_parts(stock, list(reader.read(stock, parts)))


def with_parts(stock: Stock, found: Sequence[tuple[Part, Sums]]) -> Stock:
    """Put parts, with the sums of all blocks of their chunks, in the place of these chunks."""
    if not found:
        return stock
    stock = replace(
        stock,
        rows=stock.rows.copy(),
        boxes=Regions(stock.boxes.tensors, stock.boxes.starts.copy(), stock.boxes.sizes.copy()),
        raw_bytes=stock.raw_bytes.copy(),
        is_part=stock.is_part.copy(),
    )
    for part, sums in found:
        _put(stock, part, sums)
    return stock


def _put(stock: Stock, part: Part, sums: Sums) -> None:
    chunk, blocks = part.chunk, part.blocks
    box = blocks.box(stock.box(chunk), part.first, part.last)
    num_bytes = box.size[blocks.dim] * blocks.row_bytes
    row = stock.rows[chunk : chunk + 1]
    row["offset"] += np.uint64(part.first * blocks.width * blocks.row_bytes)
    row["num_bytes"] = num_bytes
    row["fingerprint"] = sums[part.first : part.last].sum(dtype=np.uint64)
    stock.boxes.starts[chunk, : len(box.size)] = box.start
    stock.boxes.sizes[chunk, : len(box.size)] = box.size
    stock.raw_bytes[chunk] = num_bytes
    stock.is_part[chunk] = True


def place_sums(
    stock: Stock, parts: Sequence[Part], packs: Sequence[PackRef]
) -> list[tuple[int, ByteRange, Part]]:
    """Return where the sums lie that parts need: in which pack, and its range; in their order there.

    Parts whose packs end before are left out.
    """
    placed = []
    for part in parts:
        row = stock.rows[part.chunk]
        pack = int(row["pack"])
        at = ByteRange(int(row["offset"]) + int(row["num_bytes"]), part.blocks.sums_bytes)
        if pack < len(packs) and at.stop <= packs[pack].num_bytes:
            placed.append((pack, at, part))
    return sorted(placed, key=lambda one: (one[0], one[1].offset))


@dataclass(frozen=True, slots=True)
class SumsReader:
    """Reads the sums behind chunks from a source, from so many packs at a time."""

    source: Source
    manifest: Manifest
    tally: Tally
    num_threads: int

    def read(self, stock: Stock, parts: Sequence[Part]) -> Iterator[tuple[Part, Sums]]:
        """Yield the parts whose sums are there. Raises StoreUnavailable."""
        placed = place_sums(stock, parts, self.manifest.packs)
        groups = [list(group) for _, group in groupby(placed, key=lambda one: one[0])]
        for group, found in zip(groups, fan_out(self._read_pack, groups, self.num_threads), strict=True):
            for (_, _, part), data in zip(group, found, strict=False):
                sums = read_sums(data)
                if total_of(sums) == int(stock.rows[part.chunk]["fingerprint"]):
                    yield part, sums

    def _read_pack(self, placed: Sequence[tuple[int, ByteRange, Part]]) -> Sequence[Buffer]:
        """Read all sums that lie in one pack; nothing if it has not all of them."""
        pack, ranges = placed[0][0], [at for _, at, _ in placed]
        try:
            read = self.source.read(self.manifest, pack, ranges)
        except FormatError:
            return ()  # reading the chunks will tell
        self.tally.count(origins_of(self.source)(pack), ranges)
        return read
