"""Large raw chunks from files straight to where they belong, a few calls of compiled code for all of them."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import numpy as np

from checkpoint.engine.lots import Copying, begins_of, bytes_of, lay_out
from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.reading import ReadPolicy, Tally
from checkpoint.engine.regions import Column
from checkpoint.engine.rows import Flags, Lots, RowReader, Sums, find_reader
from checkpoint.engine.source import FileSource, Source, origins_of
from checkpoint.errors import Corrupt
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.manifest import Manifest

_BATCH_BYTES = 64 << 20
_BATCH_PACKS = 64  # files that a thread holds open


class Straight:
    """Fills what it can of some copies; what it leaves is to be had the plain way, which tells what is wrong.

    Whole chunks are proved at once. With a pool, the fingerprints of parts of chunks go there.
    """

    def __init__(self, copying: Copying, policy: ReadPolicy, tally: Tally) -> None:
        self._copying = copying
        self._policy = policy
        self._tally = tally
        stock, copies = copying.stock, copying.copies
        self._rows = stock.rows[copies.left]
        self._lots, self._fits = lay_out(copying)
        self._is_whole = bytes_of(self._lots) == stock.raw_bytes[copies.left]
        self._is_large = stock.large_and_raw()[copies.left]
        is_shared = self._is_large & ~self._is_whole
        self._is_due = is_shared if policy.pool is not None else np.zeros_like(is_shared)

    def read(self, source: Source, manifest: Manifest) -> Column:
        """Return the places of the copies that are filled. Raises StoreUnavailable."""
        reader = find_reader()
        if reader is None or not reads_files(source):
            return np.zeros(0, np.int64)
        fits = self._fits & self._is_large & (self._is_whole | self._is_due)
        places = np.flatnonzero(fits)
        lots, packs = self._lots[places], self._rows["pack"][places].astype(np.int64)
        sums, is_read = _Files(reader, source, manifest).read(lots, packs, self._policy.num_readers)
        is_good = is_read & (self._is_due[places] | (sums == self._rows["fingerprint"][places]))
        _count(source, self._tally, lots[is_good], packs[is_good])
        places, sums = places[is_good], sums[is_good]
        filled: Column = places
        is_due = self._is_due[places]
        self._pool(places[is_due], sums[is_due])
        return filled

    def pool_rest(self, is_done: Flags) -> None:
        """Put the parts into the pool whose chunks were read, and proved, in another way."""
        copying, sums = self._copying, []
        places = np.flatnonzero(self._is_due & is_done)
        for place in places.tolist():
            target = copying.targets[int(copying.wanted[place])]
            tensor = copying.tensors[int(copying.copies.common.tensors[place])]
            box = copying.copies.common.box(place, len(tensor.shape))
            sums.append(fingerprint(target.get(box), tensor.dtype, tensor.shape, box))
        self._pool(places, np.array(sums, np.uint64))

    def _pool(self, places: Column, sums: Sums) -> None:
        self._is_due[places] = False
        if self._policy.pool is not None and len(places):
            copying, rows = self._copying, self._rows[places]
            chunks = copying.copies.left[places]
            begins = begins_of(copying.stock.boxes.take(chunks), copying.tensors)
            keys = rows["tensor"], begins, rows["num_bytes"], rows["fingerprint"]
            self._policy.pool.add(keys, bytes_of(self._lots[places]), sums)


def reads_files(source: Source) -> TypeGuard[FileSource]:
    """Whether the packs of a source are files that compiled code reads."""
    return isinstance(source, FileSource) and source.has_files and find_reader() is not None


@dataclass(frozen=True, slots=True)
class _Files:
    """The packs of a source, as files."""

    reader: RowReader
    source: FileSource
    manifest: Manifest

    def read(self, lots: Lots, packs: Column, num_threads: int) -> tuple[Sums, Flags]:
        """Return the fingerprint of each lot, and whether all of it was there."""
        sums, is_read = np.zeros(len(lots), np.uint64), np.zeros(len(lots), np.bool_)
        batches = list(_batches(lots, packs))
        work = partial(self._read_batch, lots, packs)
        for rows, found in zip(batches, fan_out(work, batches, num_threads), strict=True):
            sums[rows], is_read[rows] = found
        return sums, is_read

    def _read_batch(self, lots: Lots, packs: Column, rows: Column) -> tuple[Sums, Flags]:
        some, is_open = lots[rows], np.zeros(len(rows), np.bool_)
        sums, is_read = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.bool_)
        with ExitStack() as files:
            for pack in np.unique(packs[rows]).tolist():
                is_here = packs[rows] == pack
                try:
                    some["descriptor"][is_here] = files.enter_context(self.source.file(self.manifest, pack))
                except Corrupt:
                    continue  # the plain way will tell
                is_open |= is_here
            sums[is_open], is_read[is_open] = self.reader.read(some[is_open])
        return sums, is_read


def _count(source: FileSource, tally: Tally, lots: Lots, packs: Column) -> None:
    """Count what was read, each row as a request."""
    origin = origins_of(source)
    for pack in np.unique(packs).tolist():
        some = lots[packs == pack]
        tally.add(origin(pack), int(some["num_rows"].sum()), int(bytes_of(some).sum()))


def _batches(lots: Lots, packs: Column) -> Iterator[Column]:
    """Yield the places of lots, in the order of the files, as many at a time as keep a thread busy."""
    order = np.lexsort((lots["offset"], packs))
    ends = np.cumsum(bytes_of(lots)[order])
    files = np.unique(packs[order], return_inverse=True)[1]
    is_last = (np.diff(ends // _BATCH_BYTES) > 0) | (np.diff(files // _BATCH_PACKS) > 0)
    yield from np.split(order, np.flatnonzero(is_last) + 1) if len(order) else ()
