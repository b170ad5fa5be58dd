"""The content of a checkpoint's chunks, read back in bounded batches and proved, deltas with their bases."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.engine.regions import Regions
from checkpoint.errors import Corrupt, FormatError, NotFound
from checkpoint.format.checks import raw_sizes
from checkpoint.format.codec import Codec, checksum, decode, xor_bytes
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.manifest import Manifest
from checkpoint.format.records import MAX_CHAIN
from checkpoint.format.table import NO_BASE, ChunkTable
from checkpoint.lifecycle.sums import Starts, are_sound, find_sums
from checkpoint.store.contract import Buffer, ByteRange, Store

_BATCH_BYTES = 32 << 20  # stored bytes held at a time
_BATCH_CHUNKS = 16384
_REQUEST_BYTES = 8 << 20
_GAP_BYTES = 64 << 10  # reading over a gap is cheaper than another request
_SPARE = (
    "they do not add up to their chunk's fingerprint; no restore needs them, but one that wants a part of it "
    "reads all of it: `repair` fetches the pack from another store"
)
_MIXERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(29))

Places = NDArray[np.intp]
Identities = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Flaw:
    """Something that is not as it was written; `key` is of the pack that is to blame."""

    key: str
    item: str
    why: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Some chunks that were read: those proved, by their identities, and the flaws of the others.

    `spare` are damaged sums of blocks, behind chunks that are as they were written; these are not `proved`.
    """

    num_bytes: int
    proved: Identities
    flaws: tuple[Flaw, ...]
    spare: tuple[Flaw, ...]


class Contents:
    """The chunks of one checkpoint, as its index lists them; `starts` tell what lies behind them."""

    def __init__(
        self, store: Store, manifest: Manifest, table: ChunkTable, starts: Mapping[str, Starts]
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._table = table
        self._rows = table.rows
        self._owners = table.owners()
        self._raw_bytes = raw_sizes(table, manifest.tensors, f"the index of step {manifest.step}")
        self._identities = self._identify()
        self._num_bytes = table.rows["num_bytes"].astype(np.int64)
        self._spans = self._num_bytes + find_sums(manifest, table, starts)

    @property
    def identities(self) -> Identities:
        """One number per chunk; the same in two checkpoints if place, content, tensor and box all are."""
        return self._identities[: len(self._table)]

    def prove(self, chunks: Places) -> Iterator[Batch]:
        """Read chunks back in the order of their packs.

        Bytes that are held stay below some 40 MiB, or what the chain of bases of a single chunk takes.
        """
        for places in self._batches(chunks):
            yield self._prove_batch(places)

    def _prove_batch(self, places: Sequence[int]) -> Batch:
        rows = sorted({row for place in places for row in self._chain(place)})
        stored = self._read(rows)
        proved: set[int] = set()
        flaws = [flaw for place in places if (flaw := self._flaw(place, stored, proved)) is not None]
        spare = {row: flaw for row in sorted(proved) if (flaw := self._spare(row, stored[row])) is not None}
        whole = self._identities[sorted(proved - spare.keys())]
        return Batch(int(self._num_bytes[rows].sum()), whole, tuple(flaws), tuple(spare.values()))

    def _batches(self, chunks: Places) -> Iterator[list[int]]:
        ordered = chunks[np.lexsort((self._rows["offset"][chunks], self._rows["pack"][chunks]))]
        costs = np.bincount(self._owners, self._rows["num_bytes"].astype(np.float64), len(self._table))
        batch: list[int] = []
        taken = 0.0
        for place, cost in zip(ordered.tolist(), costs[ordered].tolist(), strict=True):
            if batch and (taken + cost > _BATCH_BYTES or len(batch) == _BATCH_CHUNKS):
                yield batch
                batch, taken = [], 0.0
            batch.append(place)
            taken += cost
        if batch:
            yield batch

    def _chain(self, row: int) -> Iterator[int]:
        """Yield a row, and those of the bases below it."""
        while row != NO_BASE:
            yield row
            row = int(self._rows["base"][row])

    def _read(self, rows: list[int]) -> dict[int, Buffer | NotFound]:
        """Return the stored bytes of rows and the sums behind them, or why they are not there."""
        found: dict[int, Buffer | NotFound] = {}
        columns = self._rows["pack"][rows], self._rows["offset"][rows], self._spans[rows], np.array(rows)
        run: list[tuple[int, int, int]] = []
        start = stop = pack = 0
        for number, offset, num_bytes, row in sorted(zip(*(one.tolist() for one in columns), strict=True)):
            end = max(stop, offset + num_bytes)
            if run and (number != pack or offset > stop + _GAP_BYTES or end - start > _REQUEST_BYTES):
                found |= self._read_run(pack, run)
                run = []
            if not run:
                start, end, pack = offset, offset + num_bytes, number
            stop = end
            run.append((row, offset, num_bytes))
        return found | self._read_run(pack, run)

    def _read_run(self, pack: int, run: Sequence[tuple[int, int, int]]) -> dict[int, Buffer | NotFound]:
        """Read neighbours of a pack at once; if not all are there, one by one, to know which."""
        key = self._manifest.packs[pack].key
        start, stop = run[0][1], max(offset + num_bytes for _, offset, num_bytes in run)
        try:
            data = memoryview(self._store.read(key, [ByteRange(start, stop - start)])[0])
        except NotFound as error:
            if len(run) == 1:
                return {run[0][0]: error}
            alone = [self._read_run(pack, [one]) for one in run]
            return {row: found for each in alone for row, found in each.items()}
        return {row: data[offset - start :][:num_bytes] for row, offset, num_bytes in run}

    def _flaw(self, place: int, stored: Mapping[int, Buffer | NotFound], proved: set[int]) -> Flaw | None:
        """Prove a chunk from its lowest base up; say what is wrong with it."""
        raw: Buffer | None = None
        for row in reversed(list(self._chain(place))):
            try:
                raw = self._proved(place, row, stored[row], raw)
            except FormatError as error:
                at = ByteRange(int(self._rows["offset"][row]), int(self._num_bytes[row]))
                return self._blame(row, at, "", str(error))
            proved.add(row)
        return None

    def _spare(self, row: int, stored: Buffer | NotFound) -> Flaw | None:
        """Say what is wrong with the sums of blocks behind a chunk that was proved."""
        num_bytes, span = int(self._num_bytes[row]), int(self._spans[row])
        at = ByteRange(int(self._rows["offset"][row]) + num_bytes, span - num_bytes)
        if isinstance(stored, NotFound) or not at.num_bytes:
            return None
        sums = memoryview(stored)[num_bytes:]
        if are_sound(sums, at.offset, int(self._rows["fingerprint"][row])):
            return None
        return self._blame(row, at, "the sums of blocks of ", _SPARE)

    def _blame(self, row: int, at: ByteRange, what: str, why: str) -> Flaw:
        key = self._manifest.packs[int(self._rows["pack"][row])].key
        name = self._manifest.tensors[int(self._rows["tensor"][row])].name
        return Flaw(key, f"{what}{name} (bytes {at.offset}+{at.num_bytes} of {key})", why)

    def _proved(self, place: int, row: int, stored: Buffer | NotFound, below: Buffer | None) -> Buffer:
        """Return the raw bytes of a row. Raises Corrupt if they are not what was written."""
        if isinstance(stored, NotFound):
            raise Corrupt(str(stored)) from stored
        one, view = self._rows[row], memoryview(stored)
        if view.nbytes != self._spans[row]:
            raise Corrupt(f"the store gave {view.nbytes} bytes of {self._spans[row]}")
        raw = decode(Codec(one["codec"]), view[: one["num_bytes"]], int(self._raw_bytes[place]))
        if below is not None:
            raw = xor_bytes(raw, below)
        if checksum(raw) != one["checksum"].tobytes():
            raise Corrupt("its checksum does not agree")
        tensor = self._manifest.tensors[int(one["tensor"])]
        if fingerprint(raw, tensor.dtype, tensor.shape, self._table[place].box) != int(one["fingerprint"]):
            raise Corrupt("its fingerprint does not agree: it is the content of another place")
        return raw

    def _identify(self) -> Identities:
        """Digest each row: where it lies, what it holds, of what it is a box, and what lies below it."""
        rows, boxes = self._rows, Regions.of_table(self._table)
        packs = _digests(pack.key for pack in self._manifest.packs)
        tensors = _digests(f"{tensor.dtype} {tensor.shape}" for tensor in self._manifest.tensors)
        place = _mixed(len(self._table), [*boxes.starts.T, *boxes.sizes.T])
        content = np.ascontiguousarray(rows["checksum"]).view("<u8").reshape(-1, 2).T
        columns: list[NDArray[Any]] = [packs[rows["pack"]], rows["offset"], rows["num_bytes"], rows["codec"]]
        columns += [*content, rows["fingerprint"], tensors[rows["tensor"]], place[self._owners]]
        alone = whole = _mixed(len(rows), columns)
        deltas = np.flatnonzero(rows["base"] != NO_BASE)
        for _ in range(MAX_CHAIN if len(deltas) else 0):
            whole = whole.copy()
            whole[deltas] = _mixed(len(deltas), [alone[deltas], whole[rows["base"][deltas]]])
        return whole


def _digests(texts: Iterator[str]) -> Identities:
    return np.array([int.from_bytes(checksum(text.encode())[:8], "little") for text in texts], np.uint64)


def _mixed(num_rows: int, columns: Sequence[NDArray[Any]]) -> Identities:
    """Mix columns of integers into one, row by row, as splitmix64 does."""
    first, second, shift = _MIXERS
    mixed = np.zeros(num_rows, np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * first
        mixed = (mixed ^ (mixed >> shift)) * second
        mixed ^= mixed >> shift
    return mixed
