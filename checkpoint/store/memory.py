"""A store in this process's memory, for tests and rehearsals. Values end with the process."""

import threading
import time
from collections.abc import Callable, Sequence

from checkpoint.errors import AlreadyExists, NotFound
from checkpoint.store.contract import (
    Buffer,
    ByteRange,
    Data,
    Entry,
    check_key,
    check_prefix,
    check_ranges,
    joined,
)


class MemoryStore:
    """Values in a dict, under one lock."""

    def __init__(self, name: str = "", clock: Callable[[], float] = time.time) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._values: dict[str, tuple[bytes, float]] = {}

    def __str__(self) -> str:
        return f"memory://{self._name}"

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free."""
        value = bytes(joined(data))
        with self._lock:
            if check_key(key) in self._values:
                raise AlreadyExists(f"{key} exists already in {self}; nothing was written")
            self._values[key] = value, self._clock()

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        value = bytes(joined(data))
        with self._lock:
            self._values[check_key(key)] = value, self._clock()

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges without copying, or the whole value."""
        with self._lock:
            found = self._values.get(check_key(key))
        if found is None:
            raise NotFound(f"{key} is not in {self}")
        value = found[0]
        if ranges is None:
            return [value]
        check_ranges(key, ranges, len(value))
        return [memoryview(value)[wanted.offset : wanted.stop] for wanted in ranges]

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix."""
        check_prefix(prefix)
        with self._lock:
            found = [(key, *value) for key, value in self._values.items() if key.startswith(prefix)]
        return [Entry(key, len(value), modified_s) for key, value, modified_s in sorted(found)]

    def delete(self, key: str) -> None:
        """Forget the value."""
        with self._lock:
            self._values.pop(check_key(key), None)
