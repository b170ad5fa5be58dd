"""Progress of work that only asks a store: what it has read so far is how far it is."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reached:
    """How far some work is: bytes that were read, of all that it reads at least."""

    what: str
    num_done_bytes: int
    num_bytes: int


Listener = Callable[[Reached], None]


class Followed:
    """A store that tells how much was read of it; keys and values go through it unseen. Thread-safe."""

    def __init__(self, store: Any, what: str, num_bytes: int, tell: Listener) -> None:
        self._store, self._what, self._num_bytes, self._tell = store, what, num_bytes, tell
        self._num_done_bytes = 0
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self._store)

    def put_new(self, key: str, data: Any) -> None:
        """Write the value only if the key is free."""
        self._store.put_new(key, data)

    def put(self, key: str, data: Any) -> None:
        """Write the value."""
        self._store.put(key, data)

    def read(self, key: str, ranges: Any = None) -> list[Any]:
        """Return the ranges, or the whole value, and tell of it."""
        found: list[Any] = self._store.read(key, ranges)
        with self._lock:
            self._num_done_bytes += sum(len(part) for part in found)
            self._tell(Reached(self._what, self._num_done_bytes, max(self._num_bytes, self._num_done_bytes)))
        return found

    def list(self, prefix: str) -> list[Any]:
        """List the keys that begin with the prefix."""
        found: list[Any] = self._store.list(prefix)
        return found

    def delete(self, key: str) -> None:
        """Remove the key."""
        self._store.delete(key)
