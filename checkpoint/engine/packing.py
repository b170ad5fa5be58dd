"""Packs under way: chunks of one snapshot, collected until they are worth an object; and their numbers."""

from checkpoint.engine.contract import Handling, Slot
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.errors import AlreadyExists, Conflict
from checkpoint.format.codec import Codec, checksum, encode
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.keys import PACKS, pack_key, parse_pack_key
from checkpoint.format.manifest import ChunkRecord, PackRef
from checkpoint.format.pack import PackBuilder
from checkpoint.format.records import MAX_CHUNKS_PER_PAGE
from checkpoint.store.contract import Store


class OpenPack:
    """The pack that is being filled; `seq` is its number in its key."""

    def __init__(self, entry: SnapshotEntry, seq: int) -> None:
        self.entry = entry
        self.key = pack_key(entry.generation, entry.host, seq)
        self.chunks: list[ChunkRecord] = []
        self._place = entry.num_packs
        self._builder = PackBuilder(entry.generation, entry.host, seq)

    def add(self, slot: Slot, raw: memoryview, handling: Handling) -> None:
        """Fingerprint, digest and encode a chunk, and append it. What does not shrink is stored as it is."""
        spec = self.entry.content.tensors[slot.tensor]
        codec, stored = handling.codec, encode(handling.codec, raw, handling.level)
        if codec is not Codec.RAW and len(stored) >= len(raw):
            codec, stored = Codec.RAW, raw
        chunk = ChunkRecord(
            tensor=slot.tensor,
            box=slot.box,
            codec=codec,
            pack=self._place,
            offset=0,
            num_bytes=0,
            checksum=checksum(raw),
            fingerprint=fingerprint(raw, spec.dtype, spec.shape, slot.box),
        )
        self.chunks.append(self._builder.add(chunk, stored))

    def is_full(self, pack_bytes: int) -> bool:
        """Whether it is time to write it."""
        return self._builder.num_bytes >= pack_bytes or self._builder.num_chunks >= MAX_CHUNKS_PER_PAGE

    def write(self, store: Store) -> PackRef:
        """Write the pack; it is durable when this returns."""
        data = self._builder.seal(self.entry.content.tensors)
        try:
            store.put_new(self.key, data)
        except AlreadyExists as error:
            raise Conflict(
                f"{self.key} was written by somebody else: two keepers work for host {self.entry.host} "
                f"in generation {self.entry.generation}; end one of them"
            ) from error
        return PackRef(self.key, len(data))


class PackNumbers:
    """Numbers a host's packs within each generation, after those that an earlier keeper left."""

    def __init__(self, store: Store, host: str) -> None:
        self._store = store
        self._host = host
        self._next: dict[int, int] = {}

    def take(self, generation: int) -> int:
        """Return the next number that is free."""
        if generation not in self._next:
            prefix = f"{PACKS}{generation:06d}-{self._host}-"
            used = (parse_pack_key(entry.key) for entry in self._store.list(prefix))
            self._next[generation] = max((key.seq + 1 for key in used if key is not None), default=0)
        number = self._next[generation]
        self._next[generation] = number + 1
        return number
