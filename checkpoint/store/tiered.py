"""Several stores as one: read from the nearest that has the key."""

from collections.abc import Sequence

from checkpoint.errors import NotFound, StoreError, StoreUnavailable
from checkpoint.store.contract import Buffer, ByteRange, Data, Entry, Store


class Tiered:
    """Tiers with the same keys, the nearest first; the last one decides.

    A read goes to the first tier that answers. A write goes to the last tier first: what that one refuses is
    nowhere. `list` shows what any tier that answers has. Nothing is copied behind the caller's back.
    """

    def __init__(self, tiers: Sequence[Store]) -> None:
        if not tiers:
            raise StoreError("a tiered store needs at least one tier")
        self._tiers = tuple(tiers)

    def __str__(self) -> str:
        return " | ".join(str(tier) for tier in self._tiers)

    def put_new(self, key: str, data: Data) -> None:
        """Write the value everywhere, if the last tier finds the key free."""
        *near, last = self._tiers
        last.put_new(key, data)
        for tier in reversed(near):
            tier.put(key, data)

    def put(self, key: str, data: Data) -> None:
        """Write the value everywhere."""
        for tier in reversed(self._tiers):
            tier.put(key, data)

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Read from the nearest tier that has the key and can be reached."""
        failures: list[StoreError] = []
        for tier in self._tiers:
            try:
                return tier.read(key, ranges)
            except (NotFound, StoreUnavailable) as error:
                failures.append(error)
        unavailable = [error for error in failures if isinstance(error, StoreUnavailable)]
        raise (unavailable or failures)[0]

    def list(self, prefix: str) -> list[Entry]:
        """List the keys of all tiers that can be reached; the nearest tier describes a key."""
        entries: dict[str, Entry] = {}
        failures: list[StoreUnavailable] = []
        for tier in self._tiers:
            try:
                found = tier.list(prefix)
            except StoreUnavailable as error:
                failures.append(error)
                continue
            entries = {entry.key: entry for entry in found} | entries
        if len(failures) == len(self._tiers):
            raise failures[0]
        return sorted(entries.values(), key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Remove the key everywhere, from the last tier first."""
        for tier in reversed(self._tiers):
            tier.delete(key)
