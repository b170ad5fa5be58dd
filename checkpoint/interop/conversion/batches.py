"""Which chunks a target has, and in which batches they are made. Pure."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from checkpoint.engine.plan import Piece, TensorSpec, deal_pieces
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.conversion.contract import READ_BYTES, ConversionSettings, Wish


@dataclass(frozen=True, slots=True)
class Cut:
    """A chunk of the target that is to be made; twice `held_bytes` hold it beside what it is made of."""

    tensor: int
    box: Box
    num_bytes: int
    held_bytes: int


def cuts_of(specs: Sequence[TensorSpec], pieces: Iterable[Piece], widths: Sequence[int] = ()) -> list[Cut]:
    """Return the chunks of pieces, tensor by tensor, from its first row to its last.

    In that order a band of rows is read once, however its columns are divided. `widths` are the bytes that
    an element of each tensor has where it is read, if it is cast.
    """
    writes = deal_pieces(specs, pieces)
    ordered = sorted(writes, key=lambda write: (write.tensor, write.box.start))
    sizes = [itemsize(spec.dtype) for spec in specs]
    held = [(size + max(size, wide)) / 2 for size, wide in zip(sizes, widths or sizes, strict=True)]
    return [
        Cut(
            write.tensor,
            write.box,
            write.box.numel * sizes[write.tensor],
            math.ceil(write.box.numel * held[write.tensor]),
        )
        for write in ordered
    ]


def batches_of(cuts: Iterable[Cut], most_bytes: int) -> Iterator[list[Cut]]:
    """Yield chunks in order, as many at a time as can be held in so many bytes, twice."""
    batch: list[Cut] = []
    held = 0
    for cut in cuts:
        if batch and held + cut.held_bytes > most_bytes:
            yield batch
            batch, held = [], 0
        batch.append(cut)
        held += cut.held_bytes
    if batch:
        yield batch


def most_held_bytes(cuts: Iterable[Cut], settings: ConversionSettings) -> int:
    """Return the most that buffers hold while chunks are made: never more than the settings allow.

    Each thread reads, and has a batch raw and encoded; one batch waits, one pack is filled and one written.
    """
    batched = batches_of(cuts, settings.batch_bytes)
    sizes = sorted((sum(cut.held_bytes for cut in one) for one in batched), reverse=True)
    workers, total = settings.num_workers, sum(sizes)
    batches = 2 * sum(sizes[:workers]) + sum(sizes[workers : workers + 1])
    packs = min(2 * (settings.pack_bytes + max(sizes, default=0)), total)
    return min(settings.peak_bytes, batches + packs + min(workers * READ_BYTES, total))


def wishes_of(batch: Iterable[Cut]) -> list[Wish]:
    """Return what has to be read for a batch."""
    return [(cut.tensor, cut.box) for cut in batch]
