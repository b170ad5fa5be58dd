"""What an earlier checkpoint has already: chunks that need not be written again, found by their content."""

import logging
from collections.abc import Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.engine.source import StoreSource
from checkpoint.engine.sweeps import look_up
from checkpoint.errors import FormatError, NoCheckpoint
from checkpoint.format.checks import raw_sizes
from checkpoint.format.keys import manifest_key
from checkpoint.format.layout import Box
from checkpoint.format.records import ChunkRecord, PackRef, TensorRecord
from checkpoint.format.table import ChunkTable
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.checkpoint")

MAX_KNOWN = 1 << 18  # chunks, of which a terabyte has as many; each takes some 300 bytes
_MAX_DEAD = 0.75  # of a pack: from here on its last chunks are written anew, so that it can go some day
_MIN_DEAD_BYTES = 1 << 20

_KEY = np.dtype([("checksum", "V16"), ("fingerprint", "<u8"), ("num_bytes", "<u8")])


class Known:
    """The chunks of one checkpoint, as it refers to them: `packs` is the list that they count in.

    `entry` is the snapshot that it was made of, if that was one of this host.
    """

    def __init__(
        self,
        step: int,
        tensors: Sequence[TensorRecord],
        packs: Sequence[PackRef],
        table: ChunkTable,
        entry: SnapshotEntry | None = None,
    ) -> None:
        self.step = step
        self.packs = tuple(packs)
        self.entry = entry
        worth = np.flatnonzero(_is_worth_it(packs, table)[table.column("pack")])[:MAX_KNOWN]
        self._table = table.take(worth)
        self._names = [tensor.name for tensor in tensors]
        self._boxes: dict[tuple[str, Box], int] | None = None
        sizes = raw_sizes(self._table, tensors, f"the checkpoint of step {step}")
        self._rows = {key: row for row, key in enumerate(_keys(self._table, sizes))}

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, checksum: bytes, fingerprint: int, num_raw_bytes: int) -> ChunkRecord | None:
        """Return the chunk with this content, if the checkpoint has one."""
        row = self._rows.get(_key(checksum, fingerprint, num_raw_bytes))
        return None if row is None else self._table[row]

    def at(self, name: str, box: Box) -> ChunkRecord | None:
        """Return the chunk of this box of this tensor, if the checkpoint has just that one."""
        if self._boxes is None:
            self._boxes = {
                (self._names[chunk.tensor], chunk.box): row for row, chunk in enumerate(self._table)
            }
        row = self._boxes.get((name, box))
        return None if row is None else self._table[row]


class Recall:
    """Remembers the newest checkpoint of a run, as far as this host knows. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = Lock()
        self._known: Known | None = None
        self._world: tuple[str, int, tuple[str, ...]] | None = None

    def recall(self, entry: SnapshotEntry) -> Known | None:
        """Return what a new snapshot may refer to: chunks of a checkpoint that exists at this moment.

        As long as the snapshot takes less time than a prune's grace, no prune can take them away before it
        is a checkpoint as well.
        """
        world = (entry.run, entry.generation, entry.hosts)
        with self._lock:
            if self._known is None or self._world != world:
                self._known, self._world = self._seed(entry.run), world
            elif not self._store.list(manifest_key(self._known.step)):
                log.info("step %d was removed: the next checkpoint shares nothing with it", self._known.step)
                self._known = None
            return self._known

    def learn(self, known: Known) -> None:
        """Remember a checkpoint that was just made."""
        with self._lock:
            if self._known is None or known.step >= self._known.step:
                self._known = known

    def forget(self) -> None:
        """Remember nothing: the next snapshot looks anew at what the store has."""
        with self._lock:
            self._known = None

    def _seed(self, run: str) -> Known | None:
        catalog = Catalog(self._store)
        step = catalog.latest()
        if step is None:
            return None
        try:
            manifest = catalog.manifest(step)
            if manifest.run != run:
                return None
            table = StoreSource(self._store).chunks(manifest)
        except (FormatError, NoCheckpoint) as error:
            log.warning("nothing is shared with the checkpoint of step %d: %s", step, error)
            return None
        objects = [(pack.key, pack.num_bytes) for pack in manifest.packs]
        footing = look_up(self._store, objects)
        if not footing.is_firm:
            log.warning("nothing is shared with the checkpoint of step %d: %s", step, footing)
            return None
        return Known(step, manifest.tensors, manifest.packs, table)


def _is_worth_it(packs: Sequence[PackRef], table: ChunkTable) -> NDArray[np.bool_]:
    """Tell of each pack whether enough of it is still in use."""
    sizes = np.array([pack.num_bytes for pack in packs], np.float64)
    used = np.bincount(table.rows["pack"], table.rows["num_bytes"].astype(np.float64), len(packs))
    return sizes - used <= np.maximum(_MAX_DEAD * sizes, _MIN_DEAD_BYTES)


def _keys(table: ChunkTable, num_raw_bytes: NDArray[np.int64]) -> list[bytes]:
    keys = np.zeros(len(table), _KEY)
    keys["checksum"], keys["fingerprint"] = table.column("checksum"), table.column("fingerprint")
    keys["num_bytes"] = num_raw_bytes
    data = keys.tobytes()
    return [data[first : first + _KEY.itemsize] for first in range(0, len(data), _KEY.itemsize)]


def _key(checksum: bytes, fingerprint: int, num_raw_bytes: int) -> bytes:
    return checksum + fingerprint.to_bytes(8, "little") + num_raw_bytes.to_bytes(8, "little")
