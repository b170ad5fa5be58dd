"""Which chunks a target has, and in which batches they are made. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from checkpoint.engine.plan import Piece, TensorSpec, deal_pieces
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
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
