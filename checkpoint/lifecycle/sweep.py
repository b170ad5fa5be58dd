"""The sweep: deletes what nothing needs any more, safely beside those who save, promote or sweep as well.

In this order: list what there is and what needs it; tell what is about to go (`engine/sweeps`); look once
more who needs any of it; delete the rest. See `claims` for who says so, and how long it counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.engine.catalog import read_manifest
from checkpoint.engine.receipt import RECEIPT_SEQ
from checkpoint.engine.sweeps import announce_sweep
from checkpoint.errors import AlreadyExists, FormatError, NoCheckpoint, NotFound
from checkpoint.format.keys import (
    DAMAGED,
    EXPIRED,
    INDEX,
    PACKS,
    SWEEPS,
    is_object_key,
    parse_expired_key,
    parse_page_key,
    score_key,
    verified_key,
)
from checkpoint.format.manifest import Manifest, decode_manifest
from checkpoint.lifecycle.claims import Claims, Patience
from checkpoint.lifecycle.survey import Standing, list_manifests, named_by, objects_of
from checkpoint.store.contract import Entry, Store


@dataclass(frozen=True, slots=True)
class Removed:
    """An object that was deleted, and why."""

    key: str
    num_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep deleted; `num_waiting_bytes` belong to checkpoints that expired too recently."""

    removed: tuple[Removed, ...] = ()
    problems: tuple[str, ...] = ()
    num_waiting_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Grave:
    """An expired manifest; `manifest` is None if it cannot be read any more."""

    key: str
    step: int
    digest: str
    expired_s: float
    manifest: Manifest | None

    @property
    def names(self) -> set[str]:
        """The keys of its objects."""
        return set() if self.manifest is None else {ref.key for ref in objects_of(self.manifest)}


def sweep(store: Store, standing: Mapping[int, Standing], patience: Patience) -> Swept:
    """Delete what no checkpoint needs: neither those `standing`, nor newer ones, nor one on its way.

    What is younger than the patience says is left alone. May be broken off anywhere; the next sweep goes on.
    """
    listing = [*store.list(PACKS), *store.list(INDEX)]
    expired = store.list(EXPIRED)
    graves = _graves(store, expired)
    due = [grave for grave in graves if patience.is_due(grave.expired_s)]
    waiting = {key for grave in graves if grave not in due for key in grave.names}
    needed = named_by(standing.values())
    num_waiting_bytes = sum(entry.num_bytes for entry in listing if entry.key in waiting - needed)
    claims = Claims(store, patience)
    try:
        claimed, broken_off = _claimed(claims, listing, standing)
        reasons = _Reasons(due, patience, orphaned_s=_last_aside_s(store))
        spared = needed | waiting | claimed  # and what is none of ours, but lies there
        doomed = reasons.doomed(
            entry for entry in listing if entry.key not in spared and is_object_key(entry.key)
        )
        doomed += [Removed(key, 0, "a promotion that broke off") for key in broken_off]
        removed = _delete(store, doomed, claims, standing, listing) if doomed else []
    except FormatError as error:
        problem = f"{error}; no pack or page was deleted, for it may need them"
        return Swept((), (problem,), num_waiting_bytes)
    except AlreadyExists:
        return Swept((), ("another prune is deleting the same just now",), num_waiting_bytes)
    for grave in due:
        removed += _close(store, grave, standing.get(grave.step))
    for entry in (*_lone_reasons(expired), *store.list(SWEEPS)):  # of prunes that broke off
        if patience.is_abandoned(entry.modified_s):
            store.delete(entry.key)
    return Swept(tuple(removed), (), num_waiting_bytes)


def _delete(
    store: Store,
    doomed: Sequence[Removed],
    claims: Claims,
    standing: Mapping[int, Standing],
    listed: Sequence[Entry],
) -> list[Removed]:
    """Tell what is to go, spare what came to be needed or was written anew until then; delete the others."""
    told = announce_sweep(store, [one.key for one in doomed], claims.patience.now_s)
    try:
        listing = [*store.list(PACKS), *store.list(INDEX)]
        claimed, broken_off = _claimed(claims, listing, standing)
        spared = claimed | _named_since(store, standing)
    except FormatError:
        store.delete(told)
        raise
    as_it_was = {entry.key for entry in set(listing) & set(listed)}.union(broken_off)
    removed = [one for one in doomed if one.key in as_it_was - spared]
    for one in removed:
        store.delete(one.key)
    store.delete(told)
    return removed


def _claimed(
    claims: Claims, listing: Sequence[Entry], standing: Mapping[int, Standing]
) -> tuple[set[str], list[str]]:
    """Return what writers under way need, and the announcements of promotions that broke off."""
    committed = {(one.manifest.generation, one.manifest.step) for one in standing.values()}
    promoted, broken_off = claims.promoted(listing)
    return promoted | claims.named(listing, committed), broken_off


def _named_since(store: Store, standing: Mapping[int, Standing]) -> set[str]:
    """Return what manifests name that were created since those standing were read. Raises Corrupt."""
    keys: set[str] = set()
    for step, entry in list_manifests(store).items():
        if step in standing and entry == standing[step].entry:
            continue
        try:
            keys.update(ref.key for ref in objects_of(read_manifest(store, step)[0]))
        except NoCheckpoint:
            continue  # expired since
    return keys


def _lone_reasons(expired: Sequence[Entry]) -> list[Entry]:
    """List the reasons without a manifest: another prune was done with it before a dying one told why."""
    keys = {entry.key for entry in expired}
    return [entry for entry in expired if entry.key.removesuffix(".json") not in keys]


def _graves(store: Store, expired: Sequence[Entry]) -> list[_Grave]:
    graves = []
    for entry in expired:
        parsed = parse_expired_key(entry.key)
        if parsed is None:
            continue  # the reason beside it
        try:
            manifest = decode_manifest(store.read(entry.key)[0], entry.key)
        except NotFound:
            continue  # swept since
        except FormatError:
            manifest = None  # what it named is an orphan now
        graves.append(_Grave(entry.key, parsed.step, parsed.digest, entry.modified_s, manifest))
    return graves


def _close(store: Store, grave: _Grave, standing: Standing | None) -> list[Removed]:
    """Remove an expired manifest whose objects are gone, with all that was said of it, itself last."""
    keys = [f"{grave.key}.json", grave.key]
    if standing is None or standing.digest != grave.digest:  # else it stands again
        keys[:0] = [score_key(grave.step, grave.digest), verified_key(grave.step, grave.digest)]
    for key in keys:
        store.delete(key)
    return [Removed(grave.key, 0, f"all of step {grave.step}, which expired, is gone")]


def _last_aside_s(store: Store) -> float:
    """Return when a checkpoint was last set aside: any of the orphans may be left from it."""
    return max((entry.modified_s for entry in store.list(DAMAGED)), default=0.0)


class _Reasons:
    """Why an object that nothing needs is to go."""

    def __init__(self, due: Iterable[_Grave], patience: Patience, *, orphaned_s: float) -> None:
        self._graves = {key: grave for grave in due for key in grave.names}
        self._patience = patience
        self._orphaned_s = orphaned_s

    def doomed(self, entries: Iterable[Entry]) -> list[Removed]:
        """List what is to be deleted."""
        return [
            Removed(entry.key, entry.num_bytes, why) for entry in entries if (why := self._to_delete(entry))
        ]

    def _to_delete(self, entry: Entry) -> str:
        grave = self._graves.get(entry.key)
        if grave is not None and entry.modified_s <= grave.expired_s:  # else the key was used anew since
            return f"it belonged to step {grave.step}, which expired"
        if self._patience.is_abandoned(max(entry.modified_s, self._orphaned_s)):
            what = "a receipt" if _is_receipt(entry.key) else "an orphan"
            return f"{what}: nothing has needed it for {self._patience.grace_s:.0f} s"
        return ""


def _is_receipt(key: str) -> bool:
    page = parse_page_key(key)
    return page is not None and page.seq == RECEIPT_SEQ
