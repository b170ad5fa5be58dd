"""Stores around a store, for tests: one that counts, one that breaks on purpose."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from checkpoint.errors import StoreRefused, StoreUnavailable
from checkpoint.store.contract import Buffer, ByteRange, Data, Entry, Store, parts_of

Verb = Literal["put_new", "put", "read", "list", "delete"]
Struck = Verb | Literal["write"]  # what a fault strikes: a verb, or both that write, counted together
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went through a store so far: calls and bytes by verb."""

    num_calls: Mapping[str, int]
    num_bytes: Mapping[str, int]


class Metered:
    """Counts calls, whatever becomes of them, and the bytes of those that succeed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def __str__(self) -> str:
        return str(self._store)

    def traffic(self) -> Traffic:
        """Return the counts so far."""
        with self._lock:
            return Traffic(dict(self._calls), dict(self._bytes))

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free."""
        self._called("put_new")
        self._store.put_new(key, data)
        self._moved("put_new", parts_of(data))

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        self._called("put")
        self._store.put(key, data)
        self._moved("put", parts_of(data))

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges, or the whole value."""
        self._called("read")
        found = self._store.read(key, ranges)
        self._moved("read", found)
        return found

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix."""
        self._called("list")
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """Remove the key."""
        self._called("delete")
        self._store.delete(key)

    def _called(self, verb: Verb) -> None:
        with self._lock:
            self._calls[verb] += 1

    def _moved(self, verb: Verb, data: Sequence[Buffer]) -> None:
        with self._lock:
            self._bytes[verb] += sum(memoryview(part).nbytes for part in data)


@dataclass(frozen=True, slots=True)
class Lost:
    """The `nth` call (from 1) of a verb never reaches the store."""

    verb: Struck
    nth: int


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The `nth` call of a verb is carried out, but its answer is lost."""

    verb: Struck
    nth: int


@dataclass(frozen=True, slots=True)
class Death:
    """The process is killed as the `nth` call of a verb begins."""

    verb: Struck
    nth: int


@dataclass(frozen=True, slots=True)
class Short:
    """Every buffer of the `nth` read lacks its last byte: a store that breaks its contract."""

    nth: int


@dataclass(frozen=True, slots=True)
class Slow:
    """Every call of a verb takes so much longer. With Lost or Unanswered: a timeout."""

    verb: Struck
    seconds: float


@dataclass(frozen=True, slots=True)
class Full:
    """There is room for so many bytes: a write that no longer fits is refused, and nothing of it is kept."""

    num_bytes: int


Fault = Lost | Unanswered | Death | Short | Slow | Full


class Faulty:
    """A store that breaks where it is told to, to prove what stands on it."""

    def __init__(
        self, store: Store, faults: Sequence[Fault], *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._store = store
        self._faults = tuple(faults)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._num_bytes = 0

    def __str__(self) -> str:
        return str(self._store)

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free."""
        self._fill(key, data)
        self._broken("put_new", lambda: self._store.put_new(key, data))

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        self._fill(key, data)
        self._broken("put", lambda: self._store.put(key, data))

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges, or the whole value."""
        found = self._broken("read", lambda: self._store.read(key, ranges))
        if Short(self._calls["read"]) in self._faults:
            return [bytes(part)[:-1] for part in found]
        return found

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix."""
        return self._broken("list", lambda: self._store.list(prefix))

    def delete(self, key: str) -> None:
        """Remove the key."""
        self._broken("delete", lambda: self._store.delete(key))

    def _fill(self, key: str, data: Data) -> None:
        num_bytes = sum(part.nbytes for part in parts_of(data))
        with self._lock:
            for fault in self._faults:
                if isinstance(fault, Full) and self._num_bytes + num_bytes > fault.num_bytes:
                    raise StoreRefused(f"cannot write {key!r} in {self}: no space left, on purpose")
            self._num_bytes += num_bytes

    def _broken(self, verb: Verb, call: Callable[[], Answer]) -> Answer:
        with self._lock:
            counted: list[Struck] = [verb, "write"] if verb in ("put", "put_new") else [verb]
            self._calls.update(counted)
            nth = {name: self._calls[name] for name in counted}
        for fault in self._faults:
            if isinstance(fault, Slow) and fault.verb in nth:
                self._sleep(fault.seconds)
        if any(Death(name, number) in self._faults for name, number in nth.items()):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(Lost(name, number) in self._faults for name, number in nth.items()):
            raise StoreUnavailable(f"{verb} number {nth[verb]} was lost on its way to {self}, on purpose")
        answer = call()
        if any(Unanswered(name, number) in self._faults for name, number in nth.items()):
            raise StoreUnavailable(f"the answer to {verb} number {nth[verb]} of {self} was lost, on purpose")
        return answer
