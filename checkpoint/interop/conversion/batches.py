"""Which chunks a target has, and in which batches they are made. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint.engine.plan import Piece, TensorSpec, deal_pieces
from checkpoint.engine.regions import Regions, meet
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.format.table import ChunkTable
from checkpoint.interop.conversion.contract import Wish


@dataclass(frozen=True, slots=True)
class Cut:
    """A chunk of the target that is to be made."""

    tensor: int
    box: Box
    num_bytes: int


def cuts_of(specs: Sequence[TensorSpec], pieces: Iterable[Piece]) -> list[Cut]:
    """Return the chunks of pieces, tensor by tensor, from its first row to its last.

    In that order a band of rows is read once, however its columns are divided.
    """
    writes = deal_pieces(specs, pieces)
    ordered = sorted(writes, key=lambda write: (write.tensor, write.box.start))
    return [
        Cut(write.tensor, write.box, write.box.numel * itemsize(specs[write.tensor].dtype))
        for write in ordered
    ]


def batches_of(cuts: Iterable[Cut], most_bytes: int) -> Iterator[list[Cut]]:
    """Yield chunks in order, as many at a time as fit into so many raw bytes."""
    batch: list[Cut] = []
    held = 0
    for cut in cuts:
        if batch and held + cut.num_bytes > most_bytes:
            yield batch
            batch, held = [], 0
        batch.append(cut)
        held += cut.num_bytes
    if batch:
        yield batch


def wishes_of(batch: Iterable[Cut]) -> list[Wish]:
    """Return what has to be read for a batch."""
    return [(cut.tensor, cut.box) for cut in batch]


def needed_bytes(table: ChunkTable, batch: Sequence[Cut]) -> int:
    """Return how many stored bytes of a checkpoint a batch needs, if its chunks are as the table says."""
    wanted = Regions.of([cut.box for cut in batch], [cut.tensor for cut in batch])
    chunks = np.unique(meet(Regions.of_table(table), wanted).left)
    owners = table.owners()
    return int(table.rows["num_bytes"][np.isin(owners, chunks)].astype(np.int64).sum())
