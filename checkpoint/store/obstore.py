"""A store on S3 through obstore, which costs a fraction of the processor time of s3fs. Optional."""

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from checkpoint.errors import AlreadyExists, NotFound, StoreError, StoreRefused, StoreUnavailable
from checkpoint.store.contract import (
    Buffer,
    ByteRange,
    Data,
    Entry,
    check_key,
    check_prefix,
    check_url,
    joined,
    short,
)

PREFIX = "obstore+"
_PART_BYTES = 32 << 20
_NUM_PARTS_AT_ONCE = 4
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S = 10, 120
_TAKEN = {"AlreadyExistsError", "PreconditionError"}
_REFUSED = {
    *("PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError"),
    *("NotSupportedError", "InvalidPathError"),
}


class ObStore:
    """Values as objects under a URL like `obstore+s3://bucket/prefix`.

    The client is built on first use, once per process, and never pickled. Its threads do not survive a fork.
    """

    def __init__(self, url: str) -> None:
        self._url = check_url(url)
        if not url.startswith(f"{PREFIX}s3://"):
            raise StoreRefused(f"{url!r} names nothing for obstore: write obstore+s3://bucket/prefix")
        self._lock = threading.Lock()
        self._client: tuple[int, Any] | None = None

    def __str__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[type["ObStore"], tuple[str]]:
        return ObStore, (self._url,)

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free: one conditional request, however large."""
        with self._told("write", check_key(key)):
            client = self._connected()
            client.put(key, _whole(data), mode="create", use_multipart=False)

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        with self._told("write", check_key(key)):
            client = self._connected()
            client.put(key, _whole(data), chunk_size=_PART_BYTES, max_concurrency=_NUM_PARTS_AT_ONCE)

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges, fetched side by side and neighbours together, or the whole value."""
        with self._told("read", check_key(key)):
            client = self._connected()
            if ranges is None:
                return [memoryview(client.get(key).bytes())]
            spans = _spans(ranges)
            starts, stops = [span.offset for span in spans], [span.stop for span in spans]
            found = client.get_ranges(key, starts=starts, ends=stops, coalesce=0) if spans else []
            for span, data in zip(spans, found, strict=True):
                if len(data) != span.num_bytes:
                    raise short(key, span, span.offset + len(data))
            views = [memoryview(data) for data in found]
            return [_cut(part, spans, views) for part in ranges]

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix."""
        folder = check_prefix(prefix).rpartition("/")[0]
        with self._told("list", prefix):
            found = [
                one for batch in self._connected().list(folder or None, chunk_size=1000) for one in batch
            ]
        entries = (Entry(one["path"], one["size"], one["last_modified"].timestamp()) for one in found)
        return sorted(
            (entry for entry in entries if entry.key.startswith(prefix)), key=lambda entry: entry.key
        )

    def delete(self, key: str) -> None:
        """Remove the object."""
        with self._told("delete", check_key(key)), suppress(FileNotFoundError):
            self._connected().delete(key)

    def _connected(self) -> Any:
        """Return this process's client."""
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                self._client = os.getpid(), self._built()
            return self._client[1]

    def _built(self) -> Any:
        try:
            library = import_module("obstore.store")  # optional, so it is not imported before it is asked for
        except ImportError as error:
            raise StoreRefused(
                f"{self} needs obstore: pip install 'holdfast[obstore]', or leave {PREFIX!r} out of the URL"
            ) from error
        parts = urlsplit(self._url.removeprefix(PREFIX))
        return library.S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config={"disable_bulk_delete": True},  # not every server has it, and keys go one by one
            client_options={
                "allow_http": True,  # whether it is http or https says the endpoint in the environment
                "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
            },
            retry_config={"max_retries": 0},  # one layer retries, and it is not this one
        )

    @contextmanager
    def _told(self, verb: str, key: str) -> Iterator[None]:
        """Say what the library's errors mean for the store."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # its classes are known only once it is installed
            raise self._translated(error, verb, key) from error

    def _translated(self, error: Exception, verb: str, key: str) -> StoreError:
        kind = type(error).__name__
        if verb == "write" and kind in _TAKEN:
            return AlreadyExists(f"{key} exists already in {self}; nothing was written")
        message = f"cannot {verb} {key!r} in {self}: {kind}: {_brief(error)}"
        if kind in _REFUSED or "NoSuchBucket" in str(error) or isinstance(error, ValueError):
            return StoreRefused(
                f"{message}; check the URL, the bucket, and the credentials in the environment"
            )
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{key} is not in {self}")
        if "InvalidRange" in str(error):
            return NotFound(
                f"{key} in {self} is shorter than it should be: restore it or use another checkpoint"
            )
        return StoreUnavailable(message)


def _spans(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """Join ranges that touch. Left to the library, a joint range beyond the value's end would be a panic."""
    spans: list[ByteRange] = []
    for part in sorted((part for part in ranges if part.num_bytes), key=lambda part: part.offset):
        if spans and part.offset <= spans[-1].stop:
            first = spans.pop()
            spans.append(ByteRange(first.offset, max(first.stop, part.stop) - first.offset))
        else:
            spans.append(part)
    return spans


def _cut(part: ByteRange, spans: Sequence[ByteRange], found: Sequence[memoryview]) -> Buffer:
    """Return a range's bytes out of the span that it is in."""
    if not part.num_bytes:
        return b""
    number = bisect_right(spans, part.offset, key=lambda span: span.offset) - 1
    start = part.offset - spans[number].offset
    return found[number][start : start + part.num_bytes]


def _whole(data: Data) -> Buffer:
    return data if isinstance(data, memoryview) and data.contiguous else joined(data)


def _brief(error: Exception) -> str:
    """Return the first line of what the library says: below it prints the structures it is made of."""
    return str(error).partition("\n")[0][:500]
