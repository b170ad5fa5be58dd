"""Packs under way: chunks of one snapshot, collected until they are worth an object."""

from dataclasses import dataclass, field, replace

import numpy as np

from checkpoint.engine.known import Known
from checkpoint.engine.ledger import ShareEntry, SnapshotEntry
from checkpoint.engine.predecessors import Predecessors
from checkpoint.format.codec import Buffer
from checkpoint.format.keys import PackKey, pack_key
from checkpoint.format.manifest import ChunkRecord, PackRef
from checkpoint.format.pack import COPIED_BELOW, PackBuilder
from checkpoint.format.records import MAX_CHAIN, MAX_CHUNKS_PER_PAGE
from checkpoint.format.table import ChunkTable
from checkpoint.store.contract import Store

_BORROWED = 1 << 31
_MAX_CHUNKS = MAX_CHUNKS_PER_PAGE - MAX_CHAIN - 1  # so that one more fits, with all of its bases


@dataclass(eq=False, slots=True)
class Filing:
    """How far one snapshot is: its chunks so far, as they are stored, and its packs.

    `own` packs were opened here, `borrowed` ones belong to an earlier checkpoint; the number of a chunk's
    pack counts in `own` or, from _BORROWED on, in `borrowed`.
    """

    entry: SnapshotEntry
    known: Known | None = None
    bases: Predecessors | None = None
    chunks: list[ChunkRecord] = field(default_factory=list)
    own: list[PackRef | None] = field(default_factory=list)
    borrowed: dict[PackRef, int] = field(default_factory=dict)
    is_over: bool = False

    def borrow(self, chunk: ChunkRecord) -> ChunkRecord:
        """Return a chunk of an earlier checkpoint with its pack's number here; so its bases."""
        if self.known is None:
            return chunk
        pack = self.known.packs[chunk.pack]
        number = self.borrowed.setdefault(pack, _BORROWED + len(self.borrowed))
        return replace(chunk, pack=number, base=None if chunk.base is None else self.borrow(chunk.base))

    def packs(self) -> tuple[PackRef, ...]:
        """List all packs, the borrowed ones last: what the table counts in."""
        return (*(pack for pack in self.own if pack is not None), *self.borrowed)

    def table(self) -> ChunkTable:
        """Return the chunks with the numbers of `packs`."""
        table = ChunkTable.of(self.chunks)
        packs = table.rows["pack"]
        packs[packs >= _BORROWED] -= np.uint32(_BORROWED - len(self.own))
        return table


@dataclass(frozen=True, slots=True)
class PackLimits:
    """When a pack is full: so many bytes, so many of them not in the arena."""

    num_bytes: int
    num_copied_bytes: int


class OpenPack:
    """The pack that is being filled; `key` is its name."""

    def __init__(self, filing: Filing, key: PackKey, limits: PackLimits) -> None:
        self.filing = filing
        self.lent: list[ShareEntry] = []  # once for each chunk that is read from the arena
        self.key = pack_key(key.generation, key.host, key.seq, key.life)
        self._limits = limits
        self._num_copied_bytes = 0
        self._place = len(filing.own)
        filing.own.append(None)
        self._builder = PackBuilder(key.generation, key.host, key.seq)

    def add(
        self, stored: ChunkRecord, data: Buffer, lent_by: ShareEntry | None, num_pinned_bytes: int
    ) -> None:
        """Append a chunk. What a share lends is read from the arena when the pack is written.

        Else so many bytes are pinned until then, if the data are not copied here.
        """
        if stored.base is not None:
            stored = replace(stored, base=self.filing.borrow(stored.base))
        self.filing.chunks.append(self._builder.add(stored, data, self._place))
        if lent_by is None:
            self._num_copied_bytes += num_pinned_bytes if len(data) >= COPIED_BELOW else len(data)
        else:
            self.lent.append(lent_by)

    @property
    def num_bytes(self) -> int:
        """How long it is so far."""
        return self._builder.num_bytes

    @property
    def is_full(self) -> bool:
        """Whether it is time to write it."""
        return (
            self._builder.num_bytes >= self._limits.num_bytes
            or self._num_copied_bytes >= self._limits.num_copied_bytes
            or self._builder.num_chunks >= _MAX_CHUNKS
        )

    def write(self, store: Store) -> None:
        """Write the pack; it is durable when this returns."""
        store.put_new(self.key, self._builder.seal_parts(self.filing.entry.content.tensors))
        self.filing.own[self._place] = PackRef(self.key, self._builder.num_bytes)
