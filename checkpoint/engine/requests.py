"""What is asked for at a time: chunks in batches, and of their packs ranges that lie close together. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from checkpoint.engine.parts import Stock
from checkpoint.engine.reading import DECODING, WASTE, ReadPolicy, Span
from checkpoint.engine.regions import Column
from checkpoint.format.codec import Buffer, Codec
from checkpoint.format.table import NO_BASE, ChunkTable


@dataclass(slots=True)
class Run:
    """Rows of the table that lie close together in a pack: one range."""

    pack: int
    span: Span
    places: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Link:
    """A row that is to be read for a chunk: its own, or one of the bases below it."""

    chunk: int
    row: int
    above: Buffer | None = None  # the XOR of what was stored for the chunk so far


@dataclass(frozen=True, slots=True)
class Requests:
    """How chunks of a stock are asked for."""

    stock: Stock
    table: ChunkTable
    policy: ReadPolicy

    def batches(self, chunks: Column) -> Iterator[list[int]]:
        """Yield chunks in the order of their packs, as many at a time as a thread may hold."""
        chunks = chunks[np.lexsort((self.stock.rows["offset"][chunks], self.stock.rows["pack"][chunks]))]
        costs, num_decoding_bytes = self._costs(chunks)
        most = self.policy.budget_bytes // self.policy.num_readers - num_decoding_bytes
        most = min(most, self.policy.request_bytes)
        batch: list[int] = []
        cost = 0
        for chunk, more in zip(chunks.tolist(), costs.tolist(), strict=True):
            if batch and cost + more > most:
                yield batch
                batch, cost = [], 0
            batch.append(chunk)
            cost += more
        if batch:
            yield batch

    def _costs(self, chunks: Column) -> tuple[Column, int]:
        """Return what each chunk of a batch adds to what is held, and what the one being decoded takes."""
        stored = self.stock.rows["num_bytes"].astype(np.int64)
        raw = self.stock.raw_bytes[chunks]
        is_delta = self.stock.rows["base"][chunks] != NO_BASE
        costs = stored[chunks]
        if is_delta.any():
            largest = np.zeros(len(self.table), np.int64)
            np.maximum.at(largest, self.table.owners(), stored)
            costs = np.where(is_delta, largest[chunks] + raw, costs)
        is_coded = is_delta | (self.stock.rows["codec"][chunks] != Codec.RAW)
        costs += costs // WASTE
        return costs, DECODING * int(raw[is_coded].max(initial=0))

    def runs(self, level: Sequence[Link]) -> list[Run]:
        """Join rows that lie close together in a pack."""
        rows = self.stock.rows[[link.row for link in level]]
        runs: list[Run] = []
        order = np.lexsort((rows["offset"], rows["pack"]))
        for place, (pack, start, num_bytes) in zip(
            order.tolist(), rows[["pack", "offset", "num_bytes"]][order].tolist(), strict=True
        ):
            last = runs[-1] if runs and runs[-1].pack == pack else None
            if last is None or not last.span.takes(start, num_bytes, self.policy.gap_bytes):
                last = Run(pack, Span(start))
                runs.append(last)
            last.span.add(start, num_bytes)
            last.places.append(place)
        return runs
