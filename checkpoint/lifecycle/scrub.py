"""The scrub: reads checkpoints back as a restore would, and names all that is not as it was written."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from checkpoint.engine.catalog import Catalog, read_manifest
from checkpoint.engine.plan import check_chunks, check_cover
from checkpoint.errors import FormatError, Incomplete, NoCheckpoint, NotFound, StoreRefused
from checkpoint.format.keys import manifest_key
from checkpoint.format.manifest import Manifest, chunks_of_page
from checkpoint.format.table import ChunkTable
from checkpoint.lifecycle.bad import Bad
from checkpoint.lifecycle.contents import Contents, Identities, Places
from checkpoint.lifecycle.marks import forget_verified, record_verified, verified
from checkpoint.lifecycle.pace import Pace
from checkpoint.lifecycle.proof import read_pack_index
from checkpoint.lifecycle.receipts import damaged_receipts
from checkpoint.lifecycle.survey import digest_of
from checkpoint.store.contract import ByteRange, Store

_MAX_LISTED = 1000
_MAX_REMEMBERED = 4 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of one checkpoint: `num_bad` items are bad, the first thousand of them listed.

    `num_bytes` were read of it: what an earlier one shares with it was not read again. `spare` are damaged
    receipts: what hosts told each other before the commit, which no restore reads.
    """

    step: int
    num_tensors: int
    num_chunks: int
    num_bytes: int
    num_bad: int
    bad: tuple[Bad, ...]
    spare: tuple[Bad, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether everything that a restore needs is as it was written."""
        return self.num_bad == 0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read back, the newest checkpoint first, and what is wrong with it.

    `skipped` steps were verified recently enough; `left` ones did not fit the budget. `unrecorded` says why
    the store could not be told what was found, if so.
    """

    checkpoints: tuple[Verified, ...]
    skipped: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    unrecorded: str = ""

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were read back."""
        return tuple(one.step for one in self.checkpoints)

    @property
    def num_tensors(self) -> int:
        """Tensors of all these checkpoints."""
        return sum(one.num_tensors for one in self.checkpoints)

    @property
    def num_chunks(self) -> int:
        """Chunks of all these checkpoints."""
        return sum(one.num_chunks for one in self.checkpoints)

    @property
    def num_bytes(self) -> int:
        """Stored bytes that were read."""
        return sum(one.num_bytes for one in self.checkpoints)

    @property
    def num_bad(self) -> int:
        """Items that are bad."""
        return sum(one.num_bad for one in self.checkpoints)

    @property
    def bad(self) -> tuple[Bad, ...]:
        """The bad items that are listed."""
        return tuple(bad for one in self.checkpoints for bad in one.bad)

    @property
    def spare(self) -> tuple[Bad, ...]:
        """The damaged receipts, which no restore reads."""
        return tuple(bad for one in self.checkpoints for bad in one.spare)

    @property
    def is_sound(self) -> bool:
        """Whether everything that a restore needs is as it was written."""
        return self.num_bad == 0

    @property
    def bad_steps(self) -> tuple[int, ...]:
        """The steps that have something wrong."""
        return tuple(sorted(one.step for one in self.checkpoints if one.num_bad))


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
    catalog = Catalog(store)
    if step is not None:
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
        self._packs: set[str] = set()  # whose index was found to be sound

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
        tally = _Tally(manifest.step)
        table = self._index(manifest, tally)
        contents = Contents(self._store, manifest, table)
        wanted = self._without_lost_packs(manifest, table, tally)
        if self._proved:
            wanted = wanted[~np.isin(contents.identities[wanted], np.concatenate(self._proved))]
        num_bytes = 0
        for batch in contents.prove(wanted):
            num_bytes += batch.num_bytes
            self._remember(batch.proved)
            for flaw in batch.flaws:
                tally.note(flaw.item, flaw.why, flaw.key)
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
            damaged_receipts(self._store, manifest),
        )

    def _index(self, manifest: Manifest, tally: "_Tally") -> ChunkTable:
        tables = []
        for page in manifest.pages:
            try:
                tables.append(chunks_of_page(manifest, page, self._store.read(page.key)[0]))
            except (FormatError, NotFound) as error:
                tally.note(page.key, error, page.key)
        return ChunkTable.concat(tables)

    def _without_lost_packs(self, manifest: Manifest, table: ChunkTable, tally: "_Tally") -> Places:
        """Check every pack's own index; return the chunks that do not lie in packs which are gone."""
        lost = []
        for number, pack in enumerate(manifest.packs):
            if pack.key in self._packs:
                continue
            try:
                read_pack_index(self._store, pack)
            except (FormatError, NotFound) as error:
                if not self._is_gone(pack.key):
                    tally.note(f"the index of {pack.key}", error, pack.key)
                    continue
                lost.append(number)
                tally.note(pack.key, f"the pack is missing: {error}", pack.key)
            else:
                self._packs.add(pack.key)
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


@dataclass(slots=True)
class _Tally:
    """What is bad about one checkpoint, so far."""

    step: int
    num_bad: int = 0
    bad: list[Bad] = field(default_factory=list)

    def note(self, item: str, why: object, key: str = "") -> None:
        self.num_bad += 1
        if len(self.bad) < _MAX_LISTED:
            self.bad.append(Bad(self.step, item, str(why), key))


def _check_tensors(manifest: Manifest, table: ChunkTable, tally: _Tally) -> None:
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
