"""Which checkpoint of a store is meant, and its whole index, without the framework that tensors need."""

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import check_chunks
from checkpoint.engine.source import StoreSource
from checkpoint.errors import NoCheckpoint
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import ChunkTable
from checkpoint.store.contract import Store


def manifest_of(store: Store, step: int | None) -> Manifest:
    """Return the manifest of a step, or of the newest checkpoint that can be read. Raises NoCheckpoint."""
    catalog = Catalog(store)
    chosen = catalog.latest() if step is None else step
    if chosen is None:
        raise NoCheckpoint(f"{store} holds no checkpoint; check the URL")
    if chosen not in (steps := catalog.steps()):
        there = ", ".join(map(str, steps)) or "none"
        raise NoCheckpoint(f"{store} has no checkpoint of step {chosen}; it has: {there}")
    return catalog.manifest(chosen)


def index_of(store: Store, manifest: Manifest) -> ChunkTable:
    """Return the chunks of a checkpoint, which cover each tensor exactly once. Raises Corrupt, Incomplete."""
    table = StoreSource(store).chunks(manifest)
    check_chunks(manifest.tensors, table)
    return table
