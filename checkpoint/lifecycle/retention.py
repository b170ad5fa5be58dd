"""Which checkpoints are kept, and the removal of the others: a policy names every delete."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.engine.catalog import Catalog
from checkpoint.errors import FormatError, NoCheckpoint
from checkpoint.format.keys import DAMAGED, INDEX, PACKS, manifest_key, parse_page_key
from checkpoint.format.manifest import Manifest, PackRef, PageRef
from checkpoint.store.contract import Entry, Store


@dataclass(frozen=True, slots=True)
class LatestN:
    """Keep the newest `n` checkpoints."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"LatestN keeps at least one checkpoint, not {self.n}")

    def __str__(self) -> str:
        return f"the newest {self.n}"


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Keep the checkpoints of every k-th step."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"EverySteps keeps every step or fewer, not every {self.k}th")

    def __str__(self) -> str:
        return f"every {self.k} steps"


@dataclass(frozen=True, slots=True)
class Pinned:
    """Keep the checkpoints of these steps."""

    steps: frozenset[int]

    def __str__(self) -> str:
        return f"pinned {sorted(self.steps)}"


Policy = LatestN | EverySteps | Pinned


@dataclass(frozen=True, slots=True)
class Removed:
    """An object that was deleted, and why."""

    key: str
    num_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune kept, let expire and deleted; and what it left alone because it could not judge it."""

    kept: tuple[int, ...]
    expired: tuple[int, ...]
    removed: tuple[Removed, ...]
    problems: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that were freed."""
        return sum(one.num_bytes for one in self.removed)


def expired(steps: Iterable[int], policies: Sequence[Policy], *, protect: Collection[int] = ()) -> list[int]:
    """List the steps that no policy keeps, oldest first; never the newest, nor a protected one.

    Raises ValueError without any policy: that would let all but one expire.
    """
    if not policies:
        raise ValueError("name at least one retention policy")
    ordered = sorted(set(steps))
    kept = {*ordered[-1:], *protect}
    for policy in policies:
        match policy:
            case LatestN(n):
                kept.update(ordered[-n:])
            case EverySteps(k):
                kept.update(step for step in ordered if step % k == 0)
            case Pinned(pinned):
                kept.update(pinned)
    return [step for step in ordered if step not in kept]


def prune(store: Store, policies: Sequence[Policy], *, now_s: float, grace_s: float) -> PruneReport:
    """Delete the checkpoints that no policy keeps, and what no manifest has named for longer than `grace_s`.

    A checkpoint's manifest goes first, then the pages and packs that no other manifest names; a crash between
    leaves only orphans, which a later prune removes. `grace_s` has to be longer than any save takes. A
    manifest that cannot be read is left alone; while there is one, no pack or page is deleted, for it may
    need them; nor any orphan within `grace_s` of a checkpoint being set aside. The newest checkpoint never
    expires, nor does the newest one that has all of its objects.
    """
    listing = [*store.list(PACKS), *store.list(INDEX)]  # before the manifests, so that no newer one is missed
    manifests, problems = _read_manifests(Catalog(store))
    sizes = {entry.key: entry.num_bytes for entry in listing}
    whole = [step for step, manifest in manifests.items() if _is_whole(manifest, sizes)]
    gone = expired(manifests, policies, protect=whole[-1:])
    kept = [step for step in manifests if step not in gone]
    rule = f"kept are {' and '.join(map(str, policies))}"
    removed = []
    for step in gone:
        store.delete(manifest_key(step))
        removed.append(Removed(manifest_key(step), 0, f"step {step} expired: {rule}"))
    staying = [manifests[step] for step in kept]
    asides = [entry.modified_s for entry in store.list(DAMAGED)]
    reasons = _Reasons(
        [manifests[step] for step in gone], now_s, grace_s, orphaned_s=max(asides, default=0.0)
    )
    for entry in _unnamed(listing, staying) if not problems else ():
        if why := reasons.to_delete(entry):
            store.delete(entry.key)
            removed.append(Removed(entry.key, entry.num_bytes, why))
    return PruneReport(tuple(kept), tuple(gone), tuple(removed), tuple(problems))


def _read_manifests(catalog: Catalog) -> tuple[dict[int, Manifest], list[str]]:
    """Read all manifests, oldest first, and say which cannot be read."""
    manifests, problems = {}, []
    for step in catalog.steps():
        try:
            manifests[step] = catalog.manifest(step)
        except NoCheckpoint:
            continue  # deleted since it was listed
        except FormatError as error:
            problems.append(f"{error}; nothing but manifests was deleted: restore or remove this one")
    return manifests, problems


def _objects(manifest: Manifest) -> tuple[PackRef | PageRef, ...]:
    return (*manifest.packs, *manifest.pages)


def _is_whole(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(one.key) == one.num_bytes for one in _objects(manifest))


def _unnamed(listing: Iterable[Entry], staying: Iterable[Manifest]) -> list[Entry]:
    named = {one.key for manifest in staying for one in _objects(manifest)}
    return [entry for entry in listing if entry.key not in named]


class _Reasons:
    """Why an object that no staying manifest names is to go."""

    def __init__(
        self, expiring: Iterable[Manifest], now_s: float, grace_s: float, *, orphaned_s: float
    ) -> None:
        self._steps = {one.key: manifest.step for manifest in expiring for one in _objects(manifest)}
        self._receipts = {(manifest.generation, manifest.step) for manifest in expiring}
        self._now_s = now_s
        self._grace_s = grace_s
        self._orphaned_s = orphaned_s  # a checkpoint set aside then may have left any of the orphans

    def to_delete(self, entry: Entry) -> str:
        """Say why the object is to be deleted now; nothing if it is not."""
        if entry.key in self._steps:
            return f"it belonged to step {self._steps[entry.key]}, which expired"
        page = parse_page_key(entry.key)
        if page is not None and (page.generation, page.step) in self._receipts:
            return f"it belonged to step {page.step}, which expired"
        if self._now_s - max(entry.modified_s, self._orphaned_s) > self._grace_s:
            return f"an orphan: no manifest has named it for {self._grace_s:.0f} s"
        return ""
