"""One host's snapshots on their way from the arena to the store: a thread packs, one writes, one commits.

Chunks move as soon as they are announced. Bytes held besides the arena: three packs at most (one being
filled, one waiting, one being written). An error costs the snapshot it struck, never the thread, and never
the training.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from checkpoint.engine.commit import proof_of, try_commit, write_pages
from checkpoint.engine.contract import Durable
from checkpoint.engine.generations import newest_generation
from checkpoint.engine.intake import Intake, Work
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.packing import OpenPack, PackNumbers
from checkpoint.engine.receipt import Receipt, void_receipt, write_receipt
from checkpoint.errors import CheckpointError, StoreRefused, StoreUnavailable
from checkpoint.format.manifest import Manifest
from checkpoint.store.contract import Store
from checkpoint.store.wrappers import Retrying, RetryPolicy

log = logging.getLogger("holdfast.checkpoint")

_MIN_PACK_BYTES = 4 << 20
_LONGEST_WAIT_S = 15.0  # between tries during an outage

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes and patience, which is shorter once a newer world exists.

    Other hosts then have `fenced_patience_s` to bring their receipts, ranks of this host `straggler_s` to
    deliver. A store that cannot be reached is asked again for `outage_s`, beyond what its own wrapper tries;
    meanwhile snapshots wait in the arena.
    """

    pack_bytes: int = 64 << 20
    poll_s: float = 0.25
    patience_s: float = 600.0
    fenced_patience_s: float = 15.0
    straggler_s: float = 3.0
    outage_s: float = 600.0
    tier: str = "store"


@dataclass(slots=True)
class _Waiting:
    """A receipted snapshot whose manifest does not exist yet."""

    entry: SnapshotEntry
    receipt: Receipt
    since_s: float
    fenced_s: float | None = None


class Pipeline:
    """Makes checkpoints of what one host's intake takes in, together with the other hosts' pipelines."""

    def __init__(self, store: Store, intake: Intake, tuning: Tuning | None = None) -> None:
        self._store = store
        self._intake = intake
        self._tuning = tuning or Tuning()
        outage = RetryPolicy(self._tuning.outage_s, self._tuning.poll_s, _LONGEST_WAIT_S)
        # For packing and writing. The commit thread keeps the books as well, so it never waits in a request.
        self._patient_store = Retrying(store, outage, may_go_on=lambda: not intake.is_closed)
        self._pack_bytes = min(self._tuning.pack_bytes, max(intake.arena.num_bytes // 4, _MIN_PACK_BYTES))
        self._numbers = PackNumbers(self._patient_store, intake.host)
        self._pack: OpenPack | None = None
        self._to_write: queue.Queue[OpenPack | SnapshotEntry | None] = queue.Queue(maxsize=1)
        self._to_commit: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"holdfast-{name}", daemon=True)
            for name, work in (
                ("pack", self._keep_packing),
                ("write", self._keep_writing),
                ("commit", self._keep_committing),
            )
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for the threads to end, once the intake is closed; what is not durable by then is lost."""
        for thread in self._threads:
            thread.join()

    def _keep_packing(self) -> None:
        while (work := self._intake.next_work()) is not None:
            with self._costing(work.entry):
                self._hand_over_pack_of_another(work.entry)
                if work.share is None:
                    self._hand_over_pack()
                    self._to_write.put(work.entry)
                else:
                    self._pack_chunk(work)
            self._intake.packed(work)
        self._to_write.put(None)

    def _pack_chunk(self, work: Work) -> None:
        if work.share is None:
            return
        if self._pack is None:
            self._pack = OpenPack(work.entry, self._numbers.take(work.entry.generation))
        region = self._intake.arena.view(work.share.region)
        slot = work.share.plan.slots[work.chunk_index]
        self._pack.add(slot, region[slot.offset : slot.offset + slot.num_bytes], work.share.plan.handling)
        if self._pack.is_full(self._pack_bytes):
            self._hand_over_pack()

    def _hand_over_pack_of_another(self, entry: SnapshotEntry) -> None:
        """A pack holds chunks of one snapshot, so that it lives and dies with it."""
        if self._pack is not None and self._pack.entry is not entry:
            self._hand_over_pack()

    def _hand_over_pack(self) -> None:
        if self._pack is not None:
            pack, self._pack = self._pack, None
            pack.entry.num_packs += 1
            self._to_write.put(pack)

    def _keep_writing(self) -> None:
        while (item := self._to_write.get()) is not None:
            entry = item.entry if isinstance(item, OpenPack) else item
            if entry.why_failed is not None:
                continue
            with self._costing(entry):
                if isinstance(item, OpenPack):
                    entry.packs.append(item.write(self._patient_store))
                    entry.chunks += item.chunks
                else:
                    receipt = self._write_receipt(entry)
                    self._to_commit.put(_Waiting(entry, receipt, time.monotonic()))
        self._to_commit.put(None)

    def _write_receipt(self, entry: SnapshotEntry) -> Receipt:
        place = (entry.generation, entry.step, entry.host)
        leads = entry.hosts[0] == entry.host
        receipt = Receipt(
            run=entry.run,
            generation=entry.generation,
            step=entry.step,
            host=entry.host,
            hosts=entry.hosts,
            digest=entry.content.digest,
            packs=tuple(entry.packs),
            pages=tuple(write_pages(self._patient_store, place, entry.chunks)),
            proof=proof_of(entry.chunks),
            content=entry.content if leads else None,
            meta=entry.shares[0].plan.meta if leads else None,
        )
        return write_receipt(self._patient_store, receipt)

    def _keep_committing(self) -> None:
        waiting: list[_Waiting] = []
        while True:
            with suppress(queue.Empty):
                arrived = self._to_commit.get(timeout=self._tuning.poll_s)
                if arrived is None:
                    return
                waiting.append(arrived)
            for failed in self._intake.failures():
                self._tell_others(failed)
            for one in waiting:
                with self._costing(one.entry):
                    self._commit_or_wait(one)
            waiting = [one for one in waiting if one.entry.is_live]
            self._intake.expire(self._tuning.patience_s, self._tuning.straggler_s)

    def _commit_or_wait(self, one: _Waiting) -> None:
        """Commit; while the store cannot be reached, keep the snapshot for the next round."""
        try:
            self._commit(one)
        except StoreUnavailable as error:
            if isinstance(error, StoreRefused) or time.monotonic() - one.since_s > self._tuning.outage_s:
                raise
            log.warning("the commit of step %d waits for the store: %s", one.entry.step, error)

    def _commit(self, one: _Waiting) -> None:
        manifest = try_commit(self._store, one.receipt, datetime.now(UTC).isoformat(timespec="seconds"))
        now = time.monotonic()
        if manifest is not None:
            self._intake.complete(one.entry, _durable(one.entry, manifest, self._tuning.tier, now))
            return
        if one.fenced_s is None and newest_generation(self._store) > one.entry.generation:
            one.fenced_s = now
        patience_s, since_s = self._tuning.patience_s, one.since_s
        if one.fenced_s is not None:
            patience_s, since_s = self._tuning.fenced_patience_s, one.fenced_s
        if now - since_s > patience_s:
            self._intake.fail(one.entry, f"other hosts' receipts did not come within {patience_s:.0f} s")

    def _tell_others(self, entry: SnapshotEntry) -> None:
        """Void this host's receipt, so that the other hosts need not wait for it."""
        if set(entry.hosts) == {entry.host} or entry.why_failed is None:
            return
        receipt = Receipt(
            run=entry.run,
            generation=entry.generation,
            step=entry.step,
            host=entry.host,
            hosts=entry.hosts,
            digest=entry.content.digest,
            void=entry.why_failed,
        )
        try:
            void_receipt(self._store, receipt)
        except CheckpointError as error:
            log.warning("the other hosts will wait for step %d in vain: %s", entry.step, error)

    @contextmanager
    def _costing(self, entry: SnapshotEntry) -> Iterator[None]:
        """Let what goes wrong inside cost this snapshot, and nothing else."""
        try:
            yield
        except CheckpointError as error:
            self._intake.fail(entry, f"{type(error).__name__}: {error}")
        except Exception as error:
            log.exception("checkpoint of step %d", entry.step)  # a defect must not stop later checkpoints
            self._intake.fail(entry, f"{type(error).__name__}: {error}")


def fan_out(work: Callable[[Input], Output], items: Iterable[Input], num_threads: int) -> Iterator[Output]:
    """Do work on all items with a few threads; yield results in order, and raise the first error."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="holdfast-read")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _durable(entry: SnapshotEntry, manifest: Manifest, tier: str, now_s: float) -> Durable:
    num_bytes = sum(pack.num_bytes for pack in manifest.packs)
    return Durable(entry.step, entry.generation, tier, num_bytes, now_s - entry.started_s)
