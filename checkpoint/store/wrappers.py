"""A store around a store: one that tries again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from checkpoint.errors import AlreadyExists, StoreRefused, StoreUnavailable
from checkpoint.store.contract import Buffer, ByteRange, Data, Entry, Store, joined

Answer = TypeVar("Answer")
_is_wanted: ContextVar[Callable[[], bool]] = ContextVar("is_wanted", default=lambda: True)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a request is tried again: not beyond `deadline_s` after it first failed; 0: never."""

    deadline_s: float = 60.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 5.0


class Retrying:
    """Tries again while the store is unavailable, with growing, jittered waits. The one layer that retries.

    A write whose answer was lost may have happened: a second `put_new` that finds its own value in place is
    content with it. Once `may_go_on` says no, the error at hand is the last one.
    """

    def __init__(
        self, store: Store, policy: RetryPolicy | None = None, *, may_go_on: Callable[[], bool] = lambda: True
    ) -> None:
        self._store = store
        self._policy = policy or RetryPolicy()
        self._may_go_on = may_go_on

    def __str__(self) -> str:
        return str(self._store)

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free."""
        num_tries = 0

        def write() -> None:
            nonlocal num_tries
            num_tries += 1
            try:
                self._store.put_new(key, data)
            except AlreadyExists:
                if num_tries == 1 or self._store.read(key)[0] != joined(data):
                    raise

        self._tried(write)

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        self._tried(lambda: self._store.put(key, data))

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges, or the whole value."""
        return self._tried(lambda: self._store.read(key, ranges))

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix."""
        return self._tried(lambda: self._store.list(prefix))

    def delete(self, key: str) -> None:
        """Remove the key."""
        self._tried(lambda: self._store.delete(key))

    def _tried(self, request: Callable[[], Answer]) -> Answer:
        try:
            return request()
        except StoreUnavailable as error:
            if not self._policy.deadline_s:
                raise
            first = error
        return self._tried_again(request, first)

    def _tried_again(self, request: Callable[[], Answer], first: StoreUnavailable) -> Answer:
        """Go on after a first failure."""
        import stamina  # noqa: PLC0415 -- 6 MiB, which a keeper whose store never fails does not need

        policy, last, has_waited = self._policy, first, False
        for attempt in stamina.retry_context(
            on=lambda error: _may_pass(error) and self._is_wanted(),
            attempts=None,
            timeout=policy.deadline_s,
            wait_initial=policy.first_wait_s,
            wait_max=policy.longest_wait_s,
            wait_jitter=policy.first_wait_s,
        ):
            with attempt:
                if not has_waited or not self._is_wanted():  # it may have ended during the wait
                    has_waited = True
                    raise last
                try:
                    return request()
                except StoreUnavailable as error:
                    last = error
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _is_wanted(self) -> bool:
        return self._may_go_on() and _is_wanted.get()()


@contextmanager
def tried_while(is_wanted: Callable[[], bool]) -> Iterator[None]:
    """What this thread asks of any store within is tried again only while somebody wants the answer."""
    token = _is_wanted.set(is_wanted)
    try:
        yield
    finally:
        _is_wanted.reset(token)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, StoreUnavailable) and not isinstance(error, StoreRefused)
