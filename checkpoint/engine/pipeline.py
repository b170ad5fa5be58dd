"""One host's snapshots on their way from the arena to the store: the threads.

A few digest and encode, one packs in order, a few write, one commits; and one digests what memory holds.
Chunks move as soon as they are announced; those that a codec is to shrink, once their share is sealed, unless
the snapshot is held. Besides the arena, packs under way take a 128th of its size (8 MiB
at least), or the memory of one chunk each if that is more, and encoders the few chunks they are at: what is
stored as it is is written from where it lies, and what was compressed goes back to its place in the arena, if
the snapshot is not held. An error costs the snapshot it struck, never the thread, and never the training.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import ParamSpec, TypeVar

from checkpoint.engine.commit import proof_of, read_pages, write_pages
from checkpoint.engine.committer import Committer, Waiting
from checkpoint.engine.costing import costing
from checkpoint.engine.digester import Digester
from checkpoint.engine.intake import Intake
from checkpoint.engine.known import Recall
from checkpoint.engine.ledger import Flight
from checkpoint.engine.packer import Outbox, Packer, give_back
from checkpoint.engine.packing import Filing, OpenPack
from checkpoint.engine.receipt import receipt_of, write_receipt
from checkpoint.engine.tuning import Tuning
from checkpoint.store.contract import Store
from checkpoint.store.wrappers import Retrying, RetryPolicy

__all__ = ["Crew", "Pipeline", "Tuning", "apart", "fan_out"]

_LONGEST_WAIT_S = 15.0  # between tries during an outage

Given = ParamSpec("Given")
Input = TypeVar("Input")
Output = TypeVar("Output")


class Pipeline:
    """Makes checkpoints of what one host's intake takes in, together with the other hosts' pipelines."""

    def __init__(self, store: Store, intake: Intake, tuning: Tuning | None = None) -> None:
        self._intake = intake
        self._tuning = tuning = tuning or Tuning()
        outage = RetryPolicy(tuning.outage_s, tuning.poll_s, _LONGEST_WAIT_S)
        # For packing and writing. The commit thread keeps the books as well, so it never waits in a request.
        self._patient_store = Retrying(store, outage, may_go_on=lambda: not intake.is_closed)
        self._outbox: Outbox = queue.Queue(maxsize=1)
        self._encoders = Crew("encode", tuning.num_encoders)
        self._writers = Crew("write", tuning.num_writers)
        recall = Recall(self._patient_store)
        packer = Packer(self._patient_store, intake, recall, tuning, self._outbox, self._encoders.submit)
        self._committer = Committer(store, intake, recall, tuning)
        works = {
            "pack": packer.keep_packing,
            "hand": self._keep_writing,
            "commit": self._committer.keep_committing,
            "touch": self._touch,
            "digest": Digester(intake).keep_digesting,
        }
        self._threads = [
            threading.Thread(target=work, name=f"holdfast-{name}", daemon=True)
            for name, work in works.items()
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for the threads to end, once the intake is closed; what is not durable by then is lost."""
        for thread in self._threads:
            thread.join()
        self._encoders.close()
        self._writers.close()

    def _touch(self) -> None:
        """Give the arena its pages while the first snapshot is on its way."""
        while self._intake.touch():
            pass

    def _keep_writing(self) -> None:
        flying: set[Future[None]] = set()
        while (item := self._outbox.get()) is not None:
            if isinstance(item, OpenPack):
                flying.add(self._writers.submit(self._write_pack, item))
                # Now, not once the next is at hand: that would be one more in memory.
                flying = _await_all_but(self._tuning.num_writers - 1, flying)
                continue
            flying = _await_all_but(0, flying)
            if item.entry.why_failed is None:
                with costing(self._intake, item.entry):
                    self._committer.inbox.put(self._receipted(item))
        self._committer.inbox.put(None)

    def _write_pack(self, pack: OpenPack) -> None:
        entry = pack.filing.entry
        with costing(self._intake, entry):
            if entry.why_failed is None:
                entry.flying[pack.key] = Flight(pack.num_bytes, time.monotonic())
                try:
                    pack.write(self._patient_store)
                finally:
                    del entry.flying[pack.key]
        give_back(self._intake, pack)

    def _receipted(self, filing: Filing) -> Waiting:
        """Write the pages and the receipt of a snapshot whose packs are durable."""
        entry, chunks = filing.entry, filing.table()
        place = (entry.generation, entry.step, entry.host)
        pages = write_pages(self._patient_store, place, chunks, life=self._intake.life)
        tells = entry.hosts[0] == entry.host and not entry.is_alone  # else nobody reads what the state is
        share = receipt_of(entry)
        receipt = replace(
            share,
            content=share.content if tells else None,
            meta=share.meta if tells else None,
            packs=filing.packs(),
            pages=tuple(pages),
            borrowed=tuple(pack.key for pack in filing.borrowed),
            proof=proof_of(chunks),
        )
        standing = write_receipt(self._patient_store, receipt)
        if standing is not receipt:  # that of a keeper that died: its packs count, not ours
            chunks = read_pages(self._patient_store, standing.pages)
        if entry.is_alone and standing.content is None:
            standing = replace(standing, content=share.content, meta=share.meta)
        return Waiting(entry, standing, chunks, time.monotonic())


def _await_all_but(most: int, flying: set[Future[None]]) -> set[Future[None]]:
    """Wait until no more than so many are under way; return them."""
    while len(flying) > most:
        written, flying = wait(flying, return_when=FIRST_COMPLETED)
        for each in written:
            each.result()
    return flying


class Crew:
    """A few threads that do what they are given, in the order in which it comes. They hold up no exit."""

    def __init__(self, name: str, size: int) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"holdfast-{name}", daemon=True) for _ in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, work: Callable[Given, Output], *args: Given.args, **kwargs: Given.kwargs
    ) -> Future[Output]:
        """Order some work; the future has its result, or what it raised."""
        future: Future[Output] = Future()

        def carry_out() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 -- raised where the result is asked for
                future.set_exception(error)

        self._orders.put(carry_out)
        return future

    def close(self) -> None:
        """Let the threads finish what was ordered, and wait for them."""
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            order()


def apart(work: Callable[[], None]) -> None:
    """Do work in a thread of its own, that nobody waits for: it may hang."""
    threading.Thread(target=work, name="holdfast-apart", daemon=True).start()


def fan_out(work: Callable[[Input], Output], items: Iterable[Input], num_threads: int) -> Iterator[Output]:
    """Do work on all items with a few threads; yield results in order, and raise the first error.

    A single item is done by the caller itself: to start a thread takes as long as a small read.
    """
    items = list(items)
    if len(items) == 1:
        yield work(items[0])
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="holdfast-read")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
