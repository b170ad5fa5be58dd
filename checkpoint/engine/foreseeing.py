"""What a restore will read of the packs of a checkpoint, told from its index alone. Pure.

It holds as long as the first source has all that is asked of it, sound, with the sums behind its chunks.
"""

from collections.abc import Callable, Iterator

import numpy as np

from checkpoint.engine.parts import Stock, find_parts, place_sums, with_parts
from checkpoint.engine.plan import plan_copies
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.regions import Meetings, Regions
from checkpoint.engine.requests import Link, Requests
from checkpoint.format.dtypes import itemsize
from checkpoint.format.fingerprint import start_of_run
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import NO_BASE, ChunkTable
from checkpoint.store.contract import ByteRange

Asked = tuple[int, ByteRange]  # a range of a pack, by the pack's place in the manifest


def foresee(
    manifest: Manifest,
    table: ChunkTable,
    *,
    wanted: Regions,
    can_read_into: Callable[[int], bool],
    policy: ReadPolicy,
) -> Iterator[Asked]:
    """Yield the ranges that a restore of boxes asks for, each box into contiguous memory of its own.

    `can_read_into` tells of a pack whether the source reads it into the caller's memory.
    """
    boxes = Regions.of_table(table)
    sizes = np.array([itemsize(tensor.dtype) for tensor in manifest.tensors], np.int64)
    stock = Stock.of(table.rows, boxes, boxes.numels * sizes[boxes.tensors])
    copies = plan_copies(boxes, wanted)
    copies = copies.take(np.argsort(copies.left, kind="stable"))
    placed = place_sums(stock, find_parts(stock, copies, manifest.tensors), manifest.packs)
    yield from ((pack, at) for pack, at, _ in placed)
    stock = with_parts(stock, [(part, np.zeros(part.blocks.count, np.uint64)) for _, _, part in placed])
    requests, table_rows = Requests(stock, table, policy), stock.rows
    goes_straight = _Straight(manifest, requests, copies, wanted)
    for batch in requests.batches(np.unique(copies.left)):
        level = []
        for chunk in batch:
            row = table_rows[chunk]
            if can_read_into(int(row["pack"])) and goes_straight(chunk):
                yield int(row["pack"]), ByteRange(int(row["offset"]), int(row["num_bytes"]))
            else:
                level.append(Link(chunk, chunk))
        while level:
            yield from (
                (run.pack, ByteRange(run.span.start, run.span.num_bytes)) for run in requests.runs(level)
            )
            below = ((link.chunk, int(table_rows["base"][link.row])) for link in level)
            level = [Link(chunk, base) for chunk, base in below if base != NO_BASE]


class _Straight:
    """Tells which chunks are read into memory of the caller's, and not asked for in ranges."""

    def __init__(self, manifest: Manifest, requests: Requests, copies: Meetings, wanted: Regions) -> None:
        self._manifest, self._copies, self._wanted = manifest, copies, wanted
        self._stock, self._is_large_and_raw = requests.stock, requests.stock.large_and_raw()

    def __call__(self, chunk: int) -> bool:
        copies, stock = self._copies, self._stock
        if not self._is_large_and_raw[chunk]:
            return False
        tensor, box = self._manifest.tensors[int(stock.rows["tensor"][chunk])], stock.box(chunk)
        if start_of_run(tensor.dtype, tensor.shape, box) is not None:
            return True
        first, last = np.searchsorted(copies.left, [chunk, chunk + 1]).tolist()
        if last != first + 1 or copies.common.box(first, len(box.size)) != box:
            return False
        target = self._wanted.box(int(copies.right[first]), len(box.size))
        place = box.moved(target.start, (0,) * len(box.size))
        return start_of_run(tensor.dtype, target.size, place) is not None
