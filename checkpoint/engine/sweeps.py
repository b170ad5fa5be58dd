"""Sweep lists: which objects are about to be deleted, told before it happens to those who may build on them.

A prune writes its list, then looks once more for announcements (receipts, promotions), spares what they name,
deletes the rest, and removes the list. Whoever builds on objects that exist already announces them first and
then asks `look_up`. Whichever of the two comes first, the other sees it: what was announced and can
be built on stays, without any lock.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from checkpoint.errors import Corrupt, NotFound
from checkpoint.format.codec import checksum
from checkpoint.format.json_fields import Fields, dump_json, parse_json
from checkpoint.format.keys import INDEX, PACKS, SWEEPS, sweep_key
from checkpoint.format.records import MAX_LISTED
from checkpoint.format.sealed import seal, unseal
from checkpoint.store.contract import Store


def announce_sweep(store: Store, keys: Iterable[str], now_s: float) -> str:
    """Write the list of what is about to be deleted; return its key.

    Raises AlreadyExists if another prune is deleting just the same at the same time.
    """
    body = {"began_s": now_s, "keys": sorted(keys)}
    data = seal("sweep", dump_json(body, "a sweep list"))
    key = sweep_key(checksum(data).hex())
    store.put_new(key, data)
    return key


def read_sweep(store: Store, key: str) -> list[str]:
    """Return what a list says is about to be deleted; nothing if it was removed. Raises Corrupt."""
    try:
        data = store.read(key)[0]
    except NotFound:
        return []
    fields = Fields(parse_json(unseal("sweep", data, key), key), key)
    fields.json("began_s")
    keys = [str(one) for one in fields.items("keys", MAX_LISTED)]
    fields.end()
    return keys


@dataclass(frozen=True, slots=True)
class Footing:
    """What of some objects cannot be built on: keys that are gone, of another length, or going."""

    gone: tuple[str, ...]
    changed: tuple[str, ...]
    going: tuple[str, ...]

    @property
    def is_firm(self) -> bool:
        """Whether all of them can be built on."""
        return not (self.gone or self.changed or self.going)

    def __str__(self) -> str:
        parts = (
            (self.gone, "gone"),
            (self.changed, "of another length"),
            (self.going, "about to be deleted"),
        )
        return (
            "; ".join(f"{keys[0]} (of {len(keys)}) is {what}" for keys, what in parts if keys) or "all there"
        )


def look_up(store: Store, objects: Iterable[tuple[str, int]], announcements: Iterable[str] = ()) -> Footing:
    """Say whether objects (key and size) can be built on, as far as `announcements` say that they are.

    Announce them first: those that are neither gone nor changed nor going stay for as long as the
    announcement counts. One that is about to be deleted itself, being old, does not count.
    """
    doomed = being_swept(store)  # before the listing: a sweep that ended in between has left its gaps
    sizes = {entry.key: entry.num_bytes for prefix in (PACKS, INDEX) for entry in store.list(prefix)}
    wanted = dict(objects)
    there = wanted.keys() & sizes.keys()
    return Footing(
        gone=tuple(sorted(wanted.keys() - there)),
        changed=tuple(sorted(key for key in there if sizes[key] != wanted[key])),
        going=tuple(sorted(doomed & {*there, *announcements})),
    )


def being_swept(store: Store) -> frozenset[str]:
    """Return the keys that are about to be deleted."""
    going: set[str] = set()
    for entry in store.list(SWEEPS):
        try:
            going.update(read_sweep(store, entry.key))
        except Corrupt as error:
            raise Corrupt(f"{error}; a prune removes {entry.key} once it is older than its grace") from error
    return frozenset(going)
