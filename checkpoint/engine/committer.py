"""The last step of a checkpoint: receipted snapshots wait for the other hosts', and become manifests."""

import logging
import queue
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from checkpoint.engine.commit import try_commit
from checkpoint.engine.contract import Durable
from checkpoint.engine.costing import costing
from checkpoint.engine.generations import newest_generation
from checkpoint.engine.intake import Intake
from checkpoint.engine.known import Known, Recall
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.receipt import Receipt, now_utc, receipt_of, void_receipt
from checkpoint.engine.tuning import Tuning
from checkpoint.errors import CheckpointError, StoreRefused, StoreUnavailable
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import ChunkTable
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.checkpoint")


@dataclass(slots=True)
class Waiting:
    """A receipted snapshot whose manifest does not exist yet; `chunks` count in the receipt's packs."""

    entry: SnapshotEntry
    receipt: Receipt
    chunks: ChunkTable
    since_s: float
    fenced_s: float | None = None


class Committer:
    """Commits what comes into its inbox, and keeps the intake's books. It never waits in a request."""

    def __init__(self, store: Store, intake: Intake, recall: Recall, tuning: Tuning) -> None:
        self.inbox: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._store = store
        self._intake = intake
        self._recall = recall
        self._tuning = tuning

    def keep_committing(self) -> None:
        waiting: list[Waiting] = []
        while True:
            with suppress(queue.Empty):
                arrived = self.inbox.get(timeout=self._tuning.poll_s)
                if arrived is None:
                    return
                waiting.append(arrived)
            for failed in self._intake.failures():
                self._tell_others(failed)
            for one in waiting:
                with costing(self._intake, one.entry):
                    self._commit_or_wait(one)
            waiting = [one for one in waiting if one.entry.is_live]
            self._intake.expire(self._tuning.patience_s, self._tuning.straggler_s)

    def _commit_or_wait(self, one: Waiting) -> None:
        """Commit; while the store cannot be reached, keep the snapshot for the next round."""
        try:
            self._commit(one)
        except CheckpointError as error:
            is_over = time.monotonic() - one.since_s > self._tuning.outage_s
            if not isinstance(error, StoreUnavailable) or isinstance(error, StoreRefused) or is_over:
                if one.receipt.borrowed:
                    self._recall.forget()
                raise
            log.warning("the commit of step %d waits for the store: %s", one.entry.step, error)

    def _commit(self, one: Waiting) -> None:
        manifest = try_commit(self._store, one.receipt, one.chunks, now_utc(), life=self._intake.life)
        now = time.monotonic()
        if manifest is not None:
            self._learn(one, manifest)
            self._intake.complete(one.entry, _durable(one.entry, manifest, self._tuning.tier, now))
            return
        if one.fenced_s is None and newest_generation(self._store) > one.entry.generation:
            one.fenced_s = now
        patience_s, since_s = self._tuning.patience_s, one.since_s
        if one.fenced_s is not None:
            patience_s, since_s = self._tuning.fenced_patience_s, one.fenced_s
        if now - since_s > patience_s:
            self._intake.fail(
                one.entry,
                f"other hosts' receipts did not come, or a prune did not end, within {patience_s:.0f} s",
            )

    def _learn(self, one: Waiting, manifest: Manifest) -> None:
        """Let later snapshots share what this one stored, if the manifest names its packs and no others."""
        packs = one.receipt.packs
        if set(packs) <= set(manifest.packs):
            self._recall.learn(Known(manifest.step, manifest.tensors, packs, one.chunks, one.entry))

    def _tell_others(self, entry: SnapshotEntry) -> None:
        """Void this host's receipt, so that the other hosts need not wait for it."""
        if entry.is_alone or entry.why_failed is None or entry.depth == "memory":
            return
        try:
            void_receipt(
                self._store, replace(receipt_of(entry), content=None, meta=None, void=entry.why_failed)
            )
        except CheckpointError as error:
            log.warning("the other hosts will wait for step %d in vain: %s", entry.step, error)


def _durable(entry: SnapshotEntry, manifest: Manifest, tier: str, now_s: float) -> Durable:
    num_bytes = sum(pack.num_bytes for pack in manifest.packs)
    return Durable(entry.step, entry.generation, tier, num_bytes, now_s - entry.started_s)
