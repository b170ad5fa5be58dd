"""Chunks from a source into targets: few large requests, a few threads, a budget, and proof before use."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from checkpoint.engine.lots import Copying
from checkpoint.engine.parts import Stock, SumsReader, cut_to_parts, find_parts
from checkpoint.engine.passing import Share, pass_rows, put_rows
from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.plan import plan_copies
from checkpoint.engine.proving import Expected, cut_pieces
from checkpoint.engine.reading import Holes, ReadPolicy, Tally
from checkpoint.engine.regions import Column, Regions
from checkpoint.engine.requests import Link, Requests
from checkpoint.engine.source import DirectSource, Source, origins_of
from checkpoint.engine.straight import Straight
from checkpoint.engine.targets import Target
from checkpoint.errors import FormatError, StoreUnavailable
from checkpoint.format.codec import Buffer, Codec, decode, xor_bytes
from checkpoint.format.dtypes import itemsize
from checkpoint.format.fingerprint import start_of_run
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import NO_BASE, ChunkTable
from checkpoint.store.contract import ByteRange


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint as one source has it; the table lists all chunks of the tensors at hand."""

    source: Source
    manifest: Manifest
    table: ChunkTable


@dataclass(slots=True)
class _Received:
    """Pieces on their way to whoever fills them; counts their bytes."""

    pieces: Iterator[memoryview]
    num_bytes: int = 0

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            self.num_bytes += piece.nbytes
            yield piece


class Filling:
    """What one source has to say about some holes."""

    def __init__(self, opened: Opened, targets: Sequence[Target], policy: ReadPolicy, tally: Tally) -> None:
        self._opened = opened
        self._direct = opened.source if isinstance(opened.source, DirectSource) else None
        self._origin = origins_of(opened.source)
        self._targets = targets
        self._policy = policy
        self._tally = tally
        boxes = Regions.of_table(opened.table)
        sizes = np.array([itemsize(tensor.dtype) for tensor in opened.manifest.tensors], np.int64)
        self._doubted: list[int] = []  # chunks of which a part, or the sums behind it, is damaged
        self._stock = Stock.of(opened.table.rows, boxes, boxes.numels * sizes[boxes.tensors])

    def fill(self, holes: Holes) -> tuple[Holes, StoreUnavailable | None]:
        """Fill holes; return those that are left, and why the source gave no more answers if it did not.

        Raises Incomplete if the chunks leave elements of the holes out.
        """
        copies = plan_copies(self._stock.boxes, holes.regions)
        self._copies = copies = copies.take(np.argsort(copies.left, kind="stable"))
        self._firsts = np.searchsorted(copies.left, np.arange(len(self._stock.boxes) + 1))
        self._wanted = holes.wanted[copies.right]
        is_done = self._is_done = np.zeros(len(copies), np.bool_)
        copying = Copying(self._stock, copies, self._wanted, self._targets, self._opened.manifest.tensors)
        straight = Straight(copying, self._policy, self._tally)
        failure = None
        try:
            is_done[straight.read(self._opened.source, self._opened.manifest)] = True
            uncut = self._stock
            self._cut_to_parts()
            self._read(np.unique(copies.left[~is_done]))
            if self._doubted:
                self._stock, doubted = uncut, np.array(sorted(self._doubted))
                self._read(doubted)
            self._stock = uncut
        except StoreUnavailable as error:
            failure = error
        straight.pool_rest(is_done)
        return Holes(self._wanted[~is_done], copies.common.take(~is_done)), failure

    def _cut_to_parts(self) -> None:
        """See what need not be read of the chunks that are needed."""
        opened, stock = self._opened, self._stock
        parts = find_parts(stock, self._copies.take(~self._is_done), opened.manifest.tensors)
        if parts:
            sums = SumsReader(opened.source, opened.manifest, self._tally, self._policy.num_readers)
            self._stock = cut_to_parts(stock, parts, sums)

    def _read(self, chunks: Column) -> None:
        self._requests = Requests(self._stock, self._opened.table, self._policy)
        self._is_large_and_raw = self._stock.large_and_raw()
        for _ in fan_out(self._read_batch, self._requests.batches(chunks), self._policy.num_readers):
            pass

    def _read_batch(self, chunks: list[int]) -> None:
        """Read, prove and place chunks; those stored as deltas level by level, with their bases."""
        level = [Link(chunk, chunk) for chunk in chunks if not self._is_read_directly(chunk)]
        while level:
            level = [below for below in map(self._take, self._stored(level)) if below is not None]

    def _take(self, read: tuple[Link, memoryview]) -> Link | None:
        """Place the chunk of a link, or return what has to be read for it next; note what is wrong."""
        link, stored = read
        try:
            raw = self._decoded(link, stored)
            base = int(self._stock.rows["base"][link.row])
            if base != NO_BASE:  # a copy, lest a view keep all alive that was read with it
                return Link(link.chunk, base, bytes(raw))
            self._finish(link.chunk, raw)
        except FormatError as error:
            if self._stock.is_part[link.chunk]:
                self._doubted.append(link.chunk)  # as a whole it may be sound
            else:
                self._tally.note(self._opened.source.name, self._described(link.chunk), error)
        return None

    def _stored(self, level: Sequence[Link]) -> Iterator[tuple[Link, memoryview]]:
        """Read what is stored for some links. What the source has not is noted, and left out."""
        for pack, group in groupby(self._requests.runs(level), key=lambda run: run.pack):
            runs = list(group)
            ranges = [ByteRange(run.span.start, run.span.num_bytes) for run in runs]
            try:
                found = self._opened.source.read(self._opened.manifest, pack, ranges)
            except FormatError as error:
                for run in runs:
                    for place in run.places:
                        self._tally.note(self._opened.source.name, self._described(level[place].chunk), error)
                continue
            self._tally.count(self._origin(pack), ranges)
            for run, data in zip(runs, found, strict=True):
                view = memoryview(data).cast("B")
                for place in run.places:
                    row = self._stock.rows[level[place].row]
                    first = int(row["offset"]) - run.span.start
                    yield level[place], view[first : first + int(row["num_bytes"])]

    def _decoded(self, link: Link, stored: memoryview) -> Buffer:
        """Return the raw bytes of a link, XOR those above it."""
        codec = Codec(int(self._stock.rows["codec"][link.row]))
        raw = decode(codec, stored, int(self._stock.raw_bytes[link.chunk]))
        return raw if link.above is None else xor_bytes(link.above, raw)

    def _is_read_directly(self, chunk: int) -> bool:
        """Read a chunk straight to where it belongs, and prove it there; return whether that went well.

        If not it is to be read the plain way, which tells what is wrong.
        """
        source, row = self._direct, self._stock.rows[chunk]
        pack = int(row["pack"])
        if source is None or not self._is_large_and_raw[chunk] or not source.can_read_into(pack):
            return False
        pieces = self._pieces(chunk, source.piece_bytes)
        if pieces is None:
            return False
        received = _Received(pieces)
        try:
            source.read_into(self._opened.manifest, pack, int(row["offset"]), received)
            if next(pieces, None) is not None:
                return False  # it stopped early
        except FormatError:
            return False
        wanted = ByteRange(int(row["offset"]), received.num_bytes)
        self._tally.count(self._origin(pack), [wanted])
        first, last = self._copies_of(chunk)
        self._is_done[first:last] = True
        return True

    def _pieces(self, chunk: int, piece_bytes: int) -> Iterator[memoryview] | None:
        """Return the memory that a chunk goes to, piece by piece; None if it has to be had as a whole."""
        expected, shares = self._expected(chunk), self._shares(chunk)
        first = expected.first
        straight = self._straight(expected, first, shares[0], piece_bytes) if len(shares) == 1 else None
        if straight is not None or first is None or not all(share.target.is_array for share in shares):
            return straight
        rows = pass_rows(expected.dtype, expected.box, first, piece_bytes=piece_bytes, shares=shares)
        return expected.prove_coming(rows, first)

    def _straight(
        self, expected: Expected, first: int | None, share: Share, piece_bytes: int
    ) -> Iterator[memoryview] | None:
        """Return the memory of a share, and some for what nobody wants.

        None if what is wanted does not lie side by side, in the chunk or in its target.
        """
        box, part = expected.box, share.box
        memory = share.target.memory(part)
        if memory is None:
            return None
        if part == box:
            if first is None:
                return expected.prove_whole(memory)
            return expected.prove_coming(cut_pieces([memory], first, piece_bytes), first)
        begin = start_of_run(expected.dtype, box.size, part.moved(box.start, (0,) * len(box.start)))
        if begin is None or first is None:
            return None
        end = box.numel * itemsize(expected.dtype) - begin - memory.nbytes
        stretches = [memoryview(bytearray(begin)), memory, memoryview(bytearray(end))]
        return expected.prove_coming(cut_pieces(stretches, first, piece_bytes), first)

    def _finish(self, chunk: int, raw: Buffer) -> None:
        """Prove a chunk, and copy what is wanted of it."""
        expected, row = self._expected(chunk), self._stock.rows[chunk]
        if row["codec"] == Codec.RAW and row["base"] == NO_BASE:
            expected.prove(raw)
        else:
            expected.prove_decoded(raw)
        put_rows(expected.dtype, expected.box, raw, self._shares(chunk))
        first, last = self._copies_of(chunk)
        self._is_done[first:last] = True

    def _shares(self, chunk: int) -> list[Share]:
        """Return what is wanted of a chunk, and where."""
        num_dims = int(self._stock.rows["num_dims"][chunk])
        return [
            Share(self._targets[int(self._wanted[copy])], self._copies.common.box(copy, num_dims))
            for copy in range(*self._copies_of(chunk))
        ]

    def _expected(self, chunk: int) -> Expected:
        """Return what the index says of a chunk, or the sums behind it of a part."""
        row = self._stock.rows[chunk]
        tensor = self._opened.manifest.tensors[int(row["tensor"])]
        checksum = None if self._stock.is_part[chunk] else row["checksum"].tobytes()
        box = self._stock.box(chunk)
        return Expected(tensor.dtype, tensor.shape, box, int(row["fingerprint"]), checksum)

    def _copies_of(self, chunk: int) -> tuple[int, int]:
        """Return the first of a chunk's copies, and the first of the next chunk's."""
        return int(self._firsts[chunk]), int(self._firsts[chunk + 1])

    def _described(self, chunk: int) -> str:
        row = self._stock.rows[chunk]
        name = self._opened.manifest.tensors[int(row["tensor"])].name
        packs = self._opened.manifest.packs
        where = f"in {packs[int(row['pack'])].key} " if packs else ""
        return f"a chunk of {name!r} {where}at {int(row['offset'])}"


def deal_copies(table: ChunkTable, holes: Holes, num_ranks: int) -> tuple[Holes, Column]:
    """Cut holes along chunks, and say which rank is to read which: a run of chunks in the order of the packs.

    The runs take about as many stored bytes each; all of a chunk falls to one rank.
    """
    copies = plan_copies(Regions.of_table(table), holes.regions)
    chunks = np.unique(copies.left)
    rows = table.rows[chunks]
    order = np.lexsort((rows["offset"], rows["pack"]))
    reached = np.cumsum(rows["num_bytes"][order].astype(np.int64))
    owners = np.zeros(len(table), np.int64)
    middle = reached - rows["num_bytes"][order].astype(np.int64) // 2
    owners[chunks[order]] = np.minimum(middle * num_ranks // max(int(reached[-1]), 1), num_ranks - 1)
    found = owners[copies.left]
    by_owner = np.argsort(found, kind="stable")
    copies = copies.take(by_owner)
    return Holes(holes.wanted[copies.right], copies.common), found[by_owner]
