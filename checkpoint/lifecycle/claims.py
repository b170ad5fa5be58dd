"""Who is building on objects just now: snapshots with receipts, promotions. What they name stays."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from checkpoint.engine.receipt import RECEIPT_SEQ, decode_receipt
from checkpoint.errors import NotFound
from checkpoint.format.keys import PROMOTING, parse_page_key
from checkpoint.format.manifest import decode_manifest
from checkpoint.lifecycle.survey import ObjectRef, objects_of
from checkpoint.store.contract import Buffer, Entry, Store


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things are left alone, at the time `now_s`; 0 means not at all: nobody else writes then.

    `grace_s`: what nobody names, and announcements nothing has come of; longer than any save or promotion
    takes from one write to the next. `linger_s`: what belonged to a checkpoint since it expired.
    """

    now_s: float
    grace_s: float
    linger_s: float

    def is_abandoned(self, modified_s: float) -> bool:
        """Whether what was last touched then is past the grace."""
        return self.grace_s == 0 or self.now_s - modified_s > self.grace_s

    def is_due(self, expired_s: float) -> bool:
        """Whether what expired then may be swept."""
        return self.linger_s == 0 or self.now_s - expired_s > self.linger_s


class Claims:
    """Reads announcements, each at most once; a later look finds those that came since."""

    def __init__(self, store: Store, patience: Patience) -> None:
        self._store = store
        self.patience = patience
        self._seen: dict[str, tuple[ObjectRef, ...]] = {}

    def named(self, index: Iterable[Entry], committed: Collection[tuple[int, int]]) -> set[str]:
        """Return the keys that receipts name, of snapshots (generation, step) that are not committed yet.

        Raises Corrupt if a receipt within the grace cannot be read.
        """
        keys: set[str] = set()
        for entry in index:
            page = parse_page_key(entry.key)
            if page is None or page.seq != RECEIPT_SEQ or (page.generation, page.step) in committed:
                continue
            if not self.patience.is_abandoned(entry.modified_s):
                keys |= {entry.key, *(ref.key for ref in self._read(entry.key, _of_receipt))}
        return keys

    def promoted(self, listing: Iterable[Entry]) -> tuple[set[str], list[str]]:
        """Return the keys that promotions under way name, and the announcements of those that broke off.

        A promotion is under way as long as something that it names was written within the grace.
        """
        written_s = {entry.key: entry.modified_s for entry in listing}
        keys: set[str] = set()
        broken_off = []
        for entry in self._store.list(PROMOTING):
            named = {ref.key for ref in self._read(entry.key, _of_manifest)}
            latest_s = max([entry.modified_s, *(written_s[key] for key in named & written_s.keys())])
            if self.patience.is_abandoned(latest_s):
                broken_off.append(entry.key)
            else:
                keys |= named
        return keys, broken_off

    def _read(
        self, key: str, objects: Callable[[Buffer, str], tuple[ObjectRef, ...]]
    ) -> tuple[ObjectRef, ...]:
        if key not in self._seen:
            try:
                data = self._store.read(key)[0]
            except NotFound:
                return ()  # withdrawn since it was listed
            self._seen[key] = objects(data, key)
        return self._seen[key]


def _of_receipt(data: Buffer, key: str) -> tuple[ObjectRef, ...]:
    receipt = decode_receipt(data, key)
    return (*receipt.packs, *receipt.pages)


def _of_manifest(data: Buffer, key: str) -> tuple[ObjectRef, ...]:
    return objects_of(decode_manifest(data, key))
