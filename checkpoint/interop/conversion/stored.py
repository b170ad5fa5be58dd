"""A stored checkpoint as global tensors: its index is proved once, its chunks are read when asked for."""

from collections.abc import Sequence

import numpy as np

from checkpoint.engine.candidate import prove_index
from checkpoint.engine.filling import Filling, Opened
from checkpoint.engine.foreseeing import foresee
from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.reading import Holes, ReadPolicy, Tally
from checkpoint.engine.regions import Regions
from checkpoint.engine.source import StoreSource
from checkpoint.engine.targets import Target, Wanted
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.table import ChunkTable
from checkpoint.interop.conversion.contract import READ_BYTES, Array, Wish
from checkpoint.interop.conversion.finding import manifest_of
from checkpoint.store.contract import Store

_POLICY = ReadPolicy(num_threads=1, budget_bytes=READ_BYTES)
_TRIES = 2  # the second is for what went wrong on the way


class Stored:
    """A checkpoint of a store; each chunk is proved before its elements are handed out."""

    def __init__(self, store: Store, step: int | None = None) -> None:
        """Open the checkpoint of a step, or the newest. Raises NoCheckpoint, Corrupt, Incomplete."""
        self.store = store
        self._source = StoreSource(store)
        self._tally = Tally()
        self.manifest = manifest_of(store, step)
        self.table = self._source.chunks(self.manifest)
        prove_index(self.manifest, self.table, range(len(self.manifest.tensors)))
        self._rows = self.table.by_tensor()

    @property
    def tensors(self) -> Sequence[TensorSpec]:
        """The manifest's tensors."""
        return [TensorSpec(one.name, one.dtype, one.shape) for one in self.manifest.tensors]

    def foreseen_bytes(self, wishes: Sequence[Wish]) -> int:
        """Return how many bytes of packs a read of boxes takes."""
        some = [(number, box) for number, box in wishes if not box.is_empty]
        asked = foresee(
            self.manifest,
            self._chunks_of({number for number, _ in some}),
            wanted=Regions.of([box for _, box in some], [number for number, _ in some]),
            can_read_into=self._source.can_read_into,
            policy=_POLICY,
        )
        return sum(at.num_bytes for _, at in asked)

    @property
    def read_bytes(self) -> int:
        """How many bytes were read of packs so far."""
        return sum(self._tally.num_bytes.values())

    def read(self, wishes: Sequence[Wish]) -> list[Array]:
        """Return the bits of boxes. Raises Corrupt naming a chunk that is damaged, StoreUnavailable."""
        tensors = self.manifest.tensors
        found = [np.empty(box.size, dtype_of(tensors[number].dtype).carrier) for number, box in wishes]
        targets = [
            Target(Wanted(one.name, one.dtype, one.shape, box, array.reshape(-1).view(np.uint8).data))
            for (one, box), array in zip(((tensors[n], box) for n, box in wishes), found, strict=True)
        ]
        holes = Holes.all(Regions.of([box for _, box in wishes], [number for number, _ in wishes]))
        opened = Opened(self._source, self.manifest, self._chunks_of({number for number, _ in wishes}))
        for _ in range(_TRIES):
            holes, failure = Filling(opened, targets, _POLICY, self._tally).fill(holes)
            if failure is not None:
                raise failure
            if not len(holes):
                return found
        raise self._tally.last()

    def _chunks_of(self, numbers: set[int]) -> ChunkTable:
        rows = [self._rows[number] for number in sorted(numbers) if number in self._rows]
        return self.table.take(np.concatenate(rows) if rows else np.zeros(0, np.intp))
