"""Which checkpoint of a store is meant, and its whole index, without the framework that tensors need."""

from pathlib import Path

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import check_chunks
from checkpoint.engine.source import StoreSource
from checkpoint.errors import AlreadyExists, NoCheckpoint
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import ChunkTable
from checkpoint.interop.drafting import FOLDERS, check_apart, check_possible
from checkpoint.store.contract import Store
from checkpoint.store.paths import local_path

_HERE = "file://"


def check_own(store: Store) -> None:
    """See that a store that has no checkpoint yet is no directory of something else.

    Raises AlreadyExists naming what is there, StoreRefused if there can be no store here.
    """
    url = str(store)
    if url.startswith(_HERE):
        check_apart(Path(local_path(url)), url)
    if Catalog(store).steps():
        return
    strange = sorted(one.key for one in store.list("") if one.key.split("/")[0] not in FOLDERS)
    if strange:
        raise AlreadyExists(f"{store} holds {strange[:3]}, which are no store's: give a new directory")
    if url.startswith(_HERE):
        check_possible(url)


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
