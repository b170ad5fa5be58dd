"""What chunks are stored as deltas against: the same boxes in an earlier checkpoint, proved before use."""

import logging
from dataclasses import dataclass
from functools import cached_property

from checkpoint.engine.intake import Intake
from checkpoint.engine.known import Known
from checkpoint.errors import Corrupt, FormatError, StoreError
from checkpoint.format.codec import Buffer, checksum, decode, xor_bytes
from checkpoint.format.layout import Box
from checkpoint.format.records import ChunkRecord
from checkpoint.store.contract import ByteRange, Store

log = logging.getLogger("holdfast.checkpoint")


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A stored chunk and its raw bytes."""

    chunk: ChunkRecord
    raw: Buffer


class Predecessors:
    """Finds the bases of one snapshot's deltas: in the arena, if the earlier one is held, or in the store."""

    def __init__(self, store: Store, known: Known, intake: Intake) -> None:
        self._store = store
        self._known = known
        self._intake = intake

    def find(self, name: str, chunk: ChunkRecord, delta_chain: int) -> Predecessor | None:
        """Return what a chunk may be stored against; None if that would make too long a chain, or is bad."""
        found = self._known.at(name, chunk.box)
        if found is None or found.num_bases >= delta_chain:
            return None
        raw = self._held(name, chunk)
        if raw is not None and checksum(raw) == found.checksum:
            return Predecessor(found, raw)
        try:
            raw = self._read(found, chunk.num_bytes)
            if checksum(raw) != found.checksum:
                raise Corrupt(f"{self._known.packs[found.pack].key} does not hold what was written")
        except (FormatError, StoreError) as error:
            log.warning("a chunk of %r is stored in full, its base cannot be used: %s", name, error)
            return None
        return Predecessor(found, raw)

    def _held(self, name: str, chunk: ChunkRecord) -> Buffer | None:
        """Copy the base out of the arena, if it is there."""
        before = self._known.entry and self._intake.holding.pin_again(self._known.entry)
        if before is None:
            return None
        try:
            first = self._places.get((name, chunk.box))
            return None if first is None else bytes(self._memory[first : first + chunk.num_bytes])
        finally:
            self._intake.holding.unpin(before)

    @cached_property
    def _memory(self) -> memoryview:
        return self._intake.arena.memory

    @cached_property
    def _places(self) -> dict[tuple[str, Box], int]:
        """Where in the arena the earlier snapshot holds each box."""
        image = None if self._known.entry is None else self._known.entry.image
        if image is None:
            return {}
        names = [tensor.name for tensor in image.manifest.tensors]
        return {(names[chunk.tensor], chunk.box): chunk.offset for chunk in image.chunks}

    def _read(self, chunk: ChunkRecord, num_raw_bytes: int) -> Buffer:
        key = self._known.packs[chunk.pack].key
        stored = self._store.read(key, [ByteRange(chunk.offset, chunk.num_bytes)])[0]
        raw = decode(chunk.codec, stored, num_raw_bytes)
        return raw if chunk.base is None else xor_bytes(raw, self._read(chunk.base, num_raw_bytes))
