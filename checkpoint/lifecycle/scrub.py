"""The scrub: reads checkpoints back as a restore would, and names all that is not as it was written."""

from collections.abc import Collection

import numpy as np

from checkpoint.engine.bounds import check_kind, check_seconds, check_step, check_store, check_whole
from checkpoint.engine.catalog import Catalog, read_manifest
from checkpoint.engine.plan import check_chunks, check_cover
from checkpoint.errors import FormatError, Incomplete, NoCheckpoint, NotFound, StoreRefused
from checkpoint.format.keys import manifest_key
from checkpoint.format.manifest import Manifest, chunks_of_page
from checkpoint.format.table import ChunkTable
from checkpoint.lifecycle.contents import Contents, Identities, Places
from checkpoint.lifecycle.findings import Bad, Tally, Verified, VerifyReport
from checkpoint.lifecycle.marks import forget_verified, record_verified, verified
from checkpoint.lifecycle.pace import Pace
from checkpoint.lifecycle.proof import read_starts
from checkpoint.lifecycle.receipts import damaged_receipts
from checkpoint.lifecycle.sums import Starts
from checkpoint.lifecycle.survey import digest_of
from checkpoint.store.contract import ByteRange, Store

_MAX_REMEMBERED = 4 << 20


def verify(
    store: Store,
    step: int | None = None,
    *,
    since_s: float | None = None,
    budget_bytes: int | None = None,
    pace: Pace | None = None,
) -> VerifyReport:
    """Read back every chunk of one step's checkpoint, or of all: checksums, fingerprints, exact coverage.

    What was found is written to the store: the newest checkpoint that was proved never expires. Of all
    checkpoints the newest comes first, and what several share is read once. With `since_s`, a unix time,
    those are skipped that were proved since; with a `budget_bytes` none is begun once so much was read: so
    calls with the same `since_s` go on where the last one stopped.

    Bad content is listed, never raised; memory stays within some 40 MiB beside the index of a checkpoint.
    Raises NoCheckpoint if there is nothing to verify, StoreUnavailable if the store cannot be read.
    """
    check_store("store", store)
    check_kind("pace", pace, Pace | None)
    if since_s is not None:
        check_seconds("since_s", since_s)
    if budget_bytes is not None:
        check_whole("budget_bytes", budget_bytes, 1)
    catalog = Catalog(store)
    if step is not None:
        check_step(step)
        catalog.check_named(step)
    there = catalog.steps()
    if not there:
        raise NoCheckpoint(
            f"{store} holds no checkpoint at all: is the URL right, and has one become durable?"
        )
    scrub = _Scrub(store, pace)
    recent = set() if since_s is None else {key for key, at_s in verified(store).items() if at_s >= since_s}
    left: list[int] = []
    for each in sorted(there, reverse=True) if step is None else [step]:
        if budget_bytes is not None and scrub.num_bytes >= budget_bytes:
            left.append(each)
        else:
            scrub.visit(each, recent)
    if step is not None and not (scrub.done or scrub.skipped):
        raise NoCheckpoint(f"the checkpoint of step {step} in {store} was removed while it was read")
    return VerifyReport(tuple(scrub.done), tuple(scrub.skipped), tuple(left), scrub.unrecorded)


def examine(store: Store, manifest: Manifest) -> Verified:
    """Read back what a manifest names, whether it stands in the store or not; nothing is written down."""
    return _Scrub(store, None).read_back(manifest)


class _Scrub:
    """One pass over some checkpoints, and what it has proved so far."""

    def __init__(self, store: Store, pace: Pace | None) -> None:
        self.done: list[Verified] = []
        self.skipped: list[int] = []
        self.unrecorded = ""
        self._store = store
        self._pace = pace
        self._proved: list[Identities] = []  # of the chunks read last, as many as fit _MAX_REMEMBERED
        self._starts: dict[str, Starts] = {}  # of the packs whose index was found to be sound

    @property
    def num_bytes(self) -> int:
        """Stored bytes that were read so far."""
        return sum(one.num_bytes for one in self.done)

    def visit(self, step: int, recent: Collection[tuple[int, str]]) -> None:
        """Read a checkpoint back, unless it was proved recently, and write down what was found."""
        key = manifest_key(step)
        try:
            manifest, data = read_manifest(self._store, step)
        except NoCheckpoint:
            return  # pruned since it was listed
        except FormatError as error:
            self.done.append(Verified(step, 0, 0, 0, 1, (Bad(step, key, str(error), key),)))
            return
        digest = digest_of(data)
        if (step, digest) in recent:
            self.skipped.append(step)
            return
        found = self.read_back(manifest)
        if found.num_bad and not self._stands(step, digest):
            return  # pruned while it was read
        self.done.append(found)
        self._record(found, digest)

    def read_back(self, manifest: Manifest) -> Verified:
        """Read back what is not known to be sound yet."""
        tally = Tally(manifest.step)
        table = self._index(manifest, tally)
        wanted = self._without_lost_packs(manifest, table, tally)
        contents = Contents(self._store, manifest, table, self._starts)
        if self._proved:
            wanted = wanted[~np.isin(contents.identities[wanted], np.concatenate(self._proved))]
        num_bytes = 0
        for receipt in damaged_receipts(self._store, manifest):
            tally.note_spare(receipt)
        for batch in contents.prove(wanted):
            num_bytes += batch.num_bytes
            self._remember(batch.proved)
            for flaw in batch.flaws:
                tally.note(flaw.item, flaw.why, flaw.key)
            for one in batch.spare:
                tally.note_spare(Bad(manifest.step, one.item, one.why, one.key))
            if self._pace is not None:
                self._pace.spend(batch.num_bytes)
        _check_tensors(manifest, table, tally)
        return Verified(
            manifest.step,
            len(manifest.tensors),
            len(table),
            num_bytes,
            tally.num_bad,
            tuple(tally.bad),
            tuple(tally.spare),
            frozenset(tally.blamed),
        )

    def _index(self, manifest: Manifest, tally: Tally) -> ChunkTable:
        tables = []
        for page in manifest.pages:
            try:
                tables.append(chunks_of_page(manifest, page, self._store.read(page.key)[0]))
            except (FormatError, NotFound) as error:
                tally.note(page.key, error, page.key)
        return ChunkTable.concat(tables)

    def _without_lost_packs(self, manifest: Manifest, table: ChunkTable, tally: Tally) -> Places:
        """Check every pack's own index; return the chunks that do not lie in packs which are gone."""
        lost = []
        known, self._starts = self._starts, {}
        for number, pack in enumerate(manifest.packs):
            if pack.key in known:
                self._starts[pack.key] = known[pack.key]
                continue
            try:
                self._starts[pack.key] = read_starts(self._store, pack)
            except (FormatError, NotFound) as error:
                if not self._is_gone(pack.key):
                    tally.note(f"the index of {pack.key}", error, pack.key)
                    continue
                lost.append(number)
                tally.note(pack.key, f"the pack is missing: {error}", pack.key)
        owners = table.owners()[np.isin(table.rows["pack"], lost)]
        return np.setdiff1d(np.arange(len(table)), owners)

    def _is_gone(self, key: str) -> bool:
        try:
            self._store.read(key, [ByteRange(0, 1)])
        except NotFound:
            return True
        return False

    def _remember(self, proved: Identities) -> None:
        self._proved.append(proved)
        while sum(map(len, self._proved)) > _MAX_REMEMBERED:
            del self._proved[0]

    def _stands(self, step: int, digest: str) -> bool:
        try:
            return digest_of(self._store.read(manifest_key(step))[0]) == digest
        except NotFound:
            return False

    def _record(self, found: Verified, digest: str) -> None:
        """Write down whether a checkpoint is sound; a store that takes no writes can be read all the same."""
        try:
            if found.is_sound:
                record_verified(self._store, found.step, digest, found.num_bytes)
            else:
                forget_verified(self._store, found.step, digest)
        except StoreRefused as error:
            self.unrecorded = str(error)


def _check_tensors(manifest: Manifest, table: ChunkTable, tally: Tally) -> None:
    """Prove that the chunks cover every tensor exactly once, and add up to its fingerprint."""
    sums = table.fingerprint_sums()
    uncovered = _uncovered(manifest, table)
    for number, tensor in enumerate(manifest.tensors):
        if number in uncovered:
            tally.note(tensor.name, uncovered[number])
        elif sums.get(number, 0) != tensor.fingerprint:
            found = sums.get(number, 0)
            tally.note(tensor.name, f"its fingerprint is {found:016x} instead of {tensor.fingerprint:016x}")


def _uncovered(manifest: Manifest, table: ChunkTable) -> dict[int, Incomplete]:
    try:
        check_chunks(manifest.tensors, table)
    except Incomplete:
        places = table.by_tensor()
    else:
        return {}
    found = {}
    for number, tensor in enumerate(manifest.tensors):
        mine = places.get(number)
        try:
            check_cover(tensor.name, tensor.shape, [] if mine is None else [c.box for c in table.take(mine)])
        except Incomplete as error:
            found[number] = error
    return found
