"""From announced chunks to packs, in order: encoders work ahead, what they made is filed one by one."""

import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby

from checkpoint.engine.costing import costing
from checkpoint.engine.encoding import Encoded, Job, work_on
from checkpoint.engine.intake import Intake
from checkpoint.engine.known import Recall
from checkpoint.engine.ledger import ShareEntry, SnapshotId
from checkpoint.engine.naming import PackNames
from checkpoint.engine.packing import Filing, OpenPack, PackLimits
from checkpoint.engine.predecessors import Predecessors
from checkpoint.engine.tuning import Tuning
from checkpoint.engine.worklist import Work
from checkpoint.format.pack import COPIED_BELOW
from checkpoint.store.contract import Store

_MIN_PACK_BYTES = 4 << 20
_BUDGET_SHARE = 128  # of the arena: so much the packs under way may take besides it
_MIN_BUDGET_BYTES = 8 << 20
_MAX_DOUBLINGS = 20

Submit = Callable[[Callable[[Job], list[Encoded]], Job], Future[list[Encoded]]]
Outbox = queue.Queue[OpenPack | Filing | None]


@dataclass(frozen=True, slots=True)
class Ahead:
    """Work that was begun. Nothing is to be `encoded` at a snapshot's end."""

    work: Work
    filing: Filing
    encoded: Future[list[Encoded]] | None


class Packer:
    """Makes packs of what an intake takes in, and puts them into the outbox; a snapshot's filing behind them.

    The outbox is bounded, and so is what is encoded ahead.
    """

    def __init__(
        self, store: Store, intake: Intake, recall: Recall, tuning: Tuning, outbox: Outbox, submit: Submit
    ) -> None:
        self._store = store
        self._intake = intake
        self._recall = recall
        self._tuning = tuning
        self._outbox = outbox
        self._submit = submit
        self._names = PackNames(intake.host, intake.life)
        self._filings: dict[SnapshotId, Filing] = {}
        self._pack: OpenPack | None = None

    def keep_packing(self) -> None:
        ahead: deque[Ahead] = deque()
        while not self._intake.is_closed:
            timeout_s = 0.0 if ahead else self._tuning.poll_s if self._filings else None
            work = self._intake.next_work(timeout_s)
            if work is not None:
                ahead.append(self._begin(work))
            if ahead and (work is None or len(ahead) >= self._tuning.num_encoders):
                self._finish(ahead.popleft())
            self._drop_failed()
        self._outbox.put(None)

    def _begin(self, work: Work) -> Ahead:
        """Give a batch to the encoders."""
        filing = self._filings.get(work.entry.id)
        if filing is None:
            filing = self._filings[work.entry.id] = Filing(work.entry)
            with costing(self._intake, work.entry):
                self._look_back(filing, work)
        if work.share is None:
            return Ahead(work, filing, None)
        memory, is_held = self._intake.arena.memory, work.entry.is_to_be_held
        job = Job(work.share, work.chunks, memory, is_held, filing.known, filing.bases)
        return Ahead(work, filing, self._submit(work_on, job))

    def _look_back(self, filing: Filing, work: Work) -> None:
        """Find out what the snapshot may share with an earlier checkpoint."""
        filing.known = self._recall.recall(filing.entry)
        if filing.known and work.share and work.share.plan.handling.delta_chain:
            filing.bases = Predecessors(self._store, filing.known, self._intake)

    def _finish(self, ahead: Ahead) -> None:
        """Take what the encoders made of a batch."""
        entry, share = ahead.work.entry, ahead.work.share
        if share is None or ahead.encoded is None:
            with costing(self._intake, entry):
                self._end(ahead.filing)
            return
        num_lent = 0
        with costing(self._intake, entry):
            for one in ahead.encoded.result():
                num_lent += self._file(ahead.filing, one, share)
        self._intake.give_back(entry, share, len(ahead.work.chunks) - num_lent)

    def _file(self, filing: Filing, encoded: Encoded, share: ShareEntry) -> bool:
        """Put a chunk into a pack, if it is to be stored; return whether the pack reads it from the arena."""
        if filing.entry.why_failed is not None:
            return False
        if encoded.data is None:
            filing.chunks.append(filing.borrow(encoded.chunk))
            return False
        if self._pack is not None and self._pack.filing is not filing:
            self._hand_over_pack()  # a pack holds chunks of one snapshot, so that it lives and dies with it
        if self._pack is None:
            key = self._names.take(filing.entry.generation)
            self._pack = OpenPack(filing, key, self._limits(filing))
        is_lent = encoded.is_in_arena and len(encoded.data) >= COPIED_BELOW
        self._pack.add(encoded.chunk, encoded.data, share if is_lent else None, encoded.num_pinned_bytes)
        if self._pack.is_full:
            self._hand_over_pack()
        return is_lent

    def _limits(self, filing: Filing) -> PackLimits:
        """Return how large a pack may become: the first ones of a snapshot are smaller. Arenas may grow."""
        tuning, arena_bytes = self._tuning, self._intake.arena.num_bytes
        pack_bytes = min(tuning.pack_bytes, max(arena_bytes // 4, _MIN_PACK_BYTES))
        budget = max(arena_bytes // _BUDGET_SHARE, _MIN_BUDGET_BYTES)
        first_bytes = tuning.first_pack_bytes << min(len(filing.own), _MAX_DOUBLINGS)
        return PackLimits(min(pack_bytes, first_bytes), budget // tuning.num_packs_in_memory)

    def _end(self, filing: Filing) -> None:
        """Finish a snapshot of which every chunk was worked on."""
        entry = filing.entry
        self._filings.pop(entry.id, None)  # one that failed was dropped before
        if entry.is_live:
            if self._pack is not None and self._pack.filing is filing:
                self._hand_over_pack()
            self._outbox.put(filing)

    def _hand_over_pack(self) -> None:
        if self._pack is not None:
            pack, self._pack = self._pack, None
            self._outbox.put(pack)

    def _drop_failed(self) -> None:
        """Forget what nobody will finish; its chunks are no longer needed."""
        if self._pack is not None and self._pack.filing.entry.why_failed is not None:
            give_back(self._intake, self._pack)
            self._pack = None
        for filing in list(self._filings.values()):
            if not filing.entry.is_live:
                del self._filings[filing.entry.id]


def give_back(intake: Intake, pack: OpenPack) -> None:
    """Let the chunks go that a pack was to be written from, or was written from."""
    for _, lent in groupby(pack.lent, key=id):
        shares = list(lent)
        intake.give_back(pack.filing.entry, shares[0], len(shares))
    pack.lent.clear()
