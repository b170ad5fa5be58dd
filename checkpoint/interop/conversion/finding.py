"""Which checkpoint of a store is meant, and its whole index, without the framework that tensors need."""

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import check_chunks
from checkpoint.engine.source import StoreSource
from checkpoint.errors import AlreadyExists, NoCheckpoint
from checkpoint.format.keys import CONTROL, is_object_key
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import ChunkTable
from checkpoint.interop.drafting import check_apart, check_possible
from checkpoint.store.contract import Store

_HERE, _IN_THIS_PROCESS = "file://", "memory://"


def check_own(store: Store) -> None:
    """See that a store that has no checkpoint yet is no directory of something else.

    Raises AlreadyExists naming what is there, StoreRefused if there can be no store here.
    """
    url = str(store)
    if not url.startswith(_IN_THIS_PROCESS):
        check_apart(url)
    if Catalog(store).steps():
        return
    strange = sorted(one.key for one in store.list("") if not _is_own(one.key))
    if strange:
        raise AlreadyExists(f"{store} holds {strange[:3]}, which are no store's: give a new directory")
    if url.startswith(_HERE):
        check_possible(url)


def _is_own(key: str) -> bool:
    """Whether a store without a checkpoint may have a key: of a save or conversion that did not finish."""
    return is_object_key(key) or key.startswith(CONTROL)


def manifest_of(store: Store, step: int | None) -> Manifest:
    """Return the manifest of a step, or of the newest checkpoint that can be read.

    Raises NoCheckpoint, Corrupt or Unsupported if none can be read.
    """
    catalog = Catalog(store)
    if step is not None:
        catalog.check_named(step)
        return catalog.manifest(step)
    if (newest := catalog.newest()) is not None:
        return newest
    if not (steps := catalog.steps()):
        raise NoCheckpoint(f"{store} holds no checkpoint; check the URL")
    return catalog.manifest(steps[-1])


def index_of(store: Store, manifest: Manifest) -> ChunkTable:
    """Return the chunks of a checkpoint, which cover each tensor exactly once. Raises Corrupt, Incomplete."""
    table = StoreSource(store).chunks(manifest)
    check_chunks(manifest.tensors, table)
    return table
