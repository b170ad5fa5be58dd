"""Repair: what a scrub finds damaged is fetched from another store that still has it, and proved again."""

from collections.abc import Iterable
from dataclasses import dataclass

from checkpoint.engine.bounds import check_step, check_store
from checkpoint.engine.catalog import read_manifest
from checkpoint.engine.source import StoreSource
from checkpoint.engine.sweeps import look_up
from checkpoint.errors import Corrupt, FormatError, NoCheckpoint, StoreUnavailable
from checkpoint.format.keys import manifest_key, promoting_key
from checkpoint.format.manifest import Manifest, PackRef
from checkpoint.format.pack import PackIndex
from checkpoint.format.table import ChunkTable
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.findings import Verified, VerifyReport
from checkpoint.lifecycle.promotion import fetched
from checkpoint.lifecycle.proof import prove_object, prove_pack
from checkpoint.lifecycle.scrub import examine, verify
from checkpoint.lifecycle.survey import ObjectRef, digest_of, objects_of
from checkpoint.store.contract import Buffer, Store


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was mended of a checkpoint, what could not be, and what the scrub says of it now.

    `after` is None if the checkpoint could not be brought back into being.
    """

    step: int
    mended: tuple[str, ...]
    num_bytes: int
    problems: tuple[str, ...]
    after: VerifyReport | None

    @property
    def is_sound(self) -> bool:
        """Whether the checkpoint is as it was written, now."""
        return self.after is not None and self.after.is_sound


def repair(store: Store, step: int, from_: Store) -> RepairReport:
    """Mend a checkpoint whose manifest, pages or packs are damaged or missing, from another store's copies.

    A copy is proved before it replaces anything: pages by the manifest's checksums, packs chunk by chunk, and
    against what this checkpoint's index says of them. Packs of which only sums of blocks are damaged are
    replaced as well; whether the copy's are any better, `after` tells. A manifest that cannot be read is set
    aside; it, or one that is missing, is created anew once all that it names is sound. May be broken off and
    called again.

    Raises NoCheckpoint if neither store has a manifest of this step that can be read, StoreUnavailable if a
    store fails or is just being pruned.
    """
    check_store("store", store)
    check_store("from_", from_)
    check_step(step)
    manifest, data, why = _truth(store, step, from_)
    if why is not None:
        announcement = promoting_key(step, digest_of(data))
        store.put(announcement, data)
        footing = look_up(store, [(ref.key, ref.num_bytes) for ref in objects_of(manifest)], [announcement])
        if footing.going:
            raise StoreUnavailable(f"{store} is just being pruned ({footing}): repair again later")
    mending = _Mending(store, from_, manifest)
    found = mending.mend()
    if why is not None:
        if not found.is_sound:
            problems = (*mending.problems, *(f"{bad.item}: {bad.why}" for bad in found.bad))
            return RepairReport(step, tuple(mending.mended), mending.num_bytes, problems, None)
        set_aside(store, step, why)
        store.put_new(manifest_key(step), data)
        store.delete(promoting_key(step, digest_of(data)))
        mending.mended.append(manifest_key(step))
    after = verify(store, step)
    return RepairReport(step, tuple(mending.mended), mending.num_bytes, tuple(mending.problems), after)


def _truth(store: Store, step: int, from_: Store) -> tuple[Manifest, Buffer, str | None]:
    """Return the manifest to go by; if it is the other store's, why this one's will not do."""
    try:
        return *read_manifest(store, step), None
    except (FormatError, NoCheckpoint) as error:
        why = str(error)
    try:
        return *read_manifest(from_, step), why
    except (FormatError, NoCheckpoint) as error:
        raise NoCheckpoint(
            f"step {step} cannot be repaired: {why}; and in the other store: {error}"
        ) from error


class _Mending:
    """What was mended so far of the objects that one manifest names."""

    def __init__(self, store: Store, from_: Store, manifest: Manifest) -> None:
        self.mended: list[str] = []
        self.problems: list[str] = []
        self.num_bytes = 0
        self._store = store
        self._from = from_
        self._manifest = manifest
        self._tried: set[str] = set()

    def mend(self) -> Verified:
        """Mend what can be, until nothing new turns up; return what is found then."""
        while True:
            found = examine(self._store, self._manifest)
            blamed = found.blamed - self._tried
            refs: Iterable[ObjectRef] = [page for page in self._manifest.pages if page.key in blamed]
            table = ChunkTable.of([])
            if not refs and not self.problems:  # packs are held against the index, once all of it is there
                refs = [pack for pack in self._manifest.packs if pack.key in blamed]
                table = StoreSource(self._store).chunks(self._manifest)
            if not refs:
                return found
            for ref in refs:
                self._replace(ref, table)

    def _replace(self, ref: ObjectRef, table: ChunkTable) -> None:
        self._tried.add(ref.key)
        try:
            with fetched(self._from, ref) as content:
                if isinstance(ref, PackRef):
                    self._check_listed(ref, prove_pack(content, ref.key), table)
                else:
                    prove_object(ref, content)
                self._store.put(ref.key, content)
        except FormatError as error:
            self.problems.append(f"{ref.key} could not be mended: {error}")
            return
        self.mended.append(ref.key)
        self.num_bytes += ref.num_bytes

    def _check_listed(self, ref: PackRef, index: PackIndex, table: ChunkTable) -> None:
        """Raise Corrupt if a pack is another one than this checkpoint's index speaks of."""
        fields = ["offset", "num_bytes", "checksum", "fingerprint"]
        mine = table.rows[table.rows["pack"] == self._manifest.packs.index(ref)][fields]
        theirs = index.chunks.rows[: len(index.chunks)][fields]
        if not set(mine.tolist()) <= set(theirs.tolist()):
            raise Corrupt(f"the {ref.key} of {self._from} holds other chunks")
