"""The nearest tier: captured snapshots that stay in memory are digested there, whatever the store does."""

import logging
from collections.abc import Iterator, Sequence

from checkpoint.engine.commit import describe
from checkpoint.engine.encoding import digest_once
from checkpoint.engine.held import Held
from checkpoint.engine.intake import Intake
from checkpoint.engine.ledger import ShareEntry, SnapshotEntry
from checkpoint.engine.plan import check_chunks
from checkpoint.engine.receipt import now_utc, receipt_of
from checkpoint.errors import CheckpointError
from checkpoint.format.manifest import ChunkRecord
from checkpoint.format.table import ChunkTable

log = logging.getLogger("holdfast.checkpoint")

BATCH_BYTES = 1 << 20  # smaller chunks are digested together; of larger ones the packer may have the next


class Digester:
    """Digests what an intake holds; it asks no store for anything."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def keep_digesting(self) -> None:
        """Digest one snapshot after the other, until the intake is closed."""
        while (entry := self._intake.next_undigested()) is not None:
            try:
                self._intake.digested(entry, self._held(entry))
            except Exception as error:
                if not isinstance(error, CheckpointError):
                    log.exception("snapshot of step %d", entry.step)  # a defect must not stop later ones
                self._intake.forget(entry, f"{type(error).__name__}: {error}")

    def _held(self, entry: SnapshotEntry) -> Held:
        """Describe a snapshot as it lies in the arena. Raises Incomplete if a tensor is not covered."""
        records = [record for rank in entry.local_ranks for record in self._digests(entry.shares[rank])]
        chunks = ChunkTable.of(records)
        if entry.is_alone:
            check_chunks(entry.content.tensors, chunks)
        memory = self._intake.arena.memory.toreadonly()
        return Held(describe(receipt_of(entry), chunks, (), now_utc()), chunks, memory)

    def _digests(self, share: ShareEntry) -> list[ChunkRecord]:
        """Digest a share from its end, while the packer, which needs the same, comes from its beginning."""
        memory = self._intake.arena.memory.toreadonly()
        for batch in batches([slot.num_bytes for slot in share.plan.slots]):
            digest_once(share, batch, memory)
        return [share.digests[number] for number in range(len(share.plan.slots))]


def batches(sizes: Sequence[int]) -> Iterator[range]:
    """Yield the numbers of all chunks, the last ones first: small ones together, a large one by itself."""
    last = len(sizes)
    while last:
        first, num_bytes = last - 1, sizes[last - 1]
        while first and num_bytes + sizes[first - 1] <= BATCH_BYTES:
            first, num_bytes = first - 1, num_bytes + sizes[first - 1]
        yield range(first, last)
        last = first
