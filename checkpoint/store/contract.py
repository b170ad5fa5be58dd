"""What every store promises: five verbs on whole values, and nothing about what is in them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

from checkpoint.errors import NotFound, StoreError, StoreRefused

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer]  # a value, or its parts one after the other

_MAX_KEY_LENGTH = 512
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9._/-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Some bytes of a value."""

    offset: int
    num_bytes: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.num_bytes < 0:
            raise StoreError(
                f"a range cannot begin or reach below zero: {self.offset}, {self.num_bytes} bytes"
            )

    @property
    def stop(self) -> int:
        """Where the range ends, exclusive."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a listing. `modified_s` is unix time by the store's clock; infinite if it does not tell."""

    key: str
    num_bytes: int
    modified_s: float


@runtime_checkable
class Store(Protocol):
    """Bytes by key. Blocking, thread-safe; a write is whole or absent, never torn; `str` of it is its URL.

    A key is one or more names of [A-Za-z0-9._-], joined by "/"; no name begins with a dot. Once a write has
    returned, its value is durable and every reader sees it. Any verb may raise StoreUnavailable: then a write
    may or may not have happened. What is written is one buffer, or a list of them: its parts, in order.
    """

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free, atomically. Raises AlreadyExists."""

    def put(self, key: str, data: Data) -> None:
        """Write the value, in place of the one there is."""

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return one buffer per range, of exactly its length; without ranges the whole value as the only one.

        Raises NotFound if there is no such key, or if it is too short for a range.
        """

    def list(self, prefix: str) -> list[Entry]:
        """List what has a key that begins with the prefix, by key; nothing if there is nothing."""

    def delete(self, key: str) -> None:
        """Remove the key; to remove what is not there is fine."""


def parts_of(data: Data) -> list[memoryview]:
    """Return the parts of a value as flat bytes, the empty ones left out."""
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    return [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]


def joined(data: Data) -> bytes | bytearray:
    """Return a value as one buffer: itself if it is one that every client library takes, else a copy."""
    return data if isinstance(data, bytes | bytearray) else b"".join(parts_of(data))


_AZURE = {"abfs", "abfss", "wasb", "wasbs"}  # container@account is how these name a place


def check_url(url: str) -> str:
    """Return the URL without slashes at its end.

    Raises StoreRefused if there are credentials in it, or if it names nothing: clients would take what is
    left of it, once the slashes are gone, for a local directory.
    """
    parts = urlsplit(url)
    if parts.scheme and not url.partition("://")[2].strip("/"):
        raise StoreRefused(f"{url!r} names no place: give the bucket or container too, {parts.scheme}://NAME")
    user, at, _ = parts.netloc.rpartition("@")
    is_container = parts.scheme in _AZURE and ":" not in user
    if at and not is_container:
        raise StoreRefused("a store's URL holds no credentials: put them into the environment")
    return url.rstrip("/")


def check_key(key: str) -> str:
    """Return the key, if it is one. Raises StoreError for anything that could lead out of the store."""
    if len(key) > _MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise StoreError(
            f"{key[:80]!r} is no key: use names of [A-Za-z0-9._-] joined by '/', none beginning with '.'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return what keys may begin with. Raises StoreError."""
    if not _PREFIX.fullmatch(prefix) or ".." in prefix or prefix.startswith("/"):
        raise StoreError(f"{prefix[:80]!r} is nothing that a key could begin with")
    return prefix


def check_ranges(key: str, ranges: Sequence[ByteRange], num_bytes: int) -> None:
    """Raise NotFound if a value of this length does not hold all of the ranges."""
    for wanted in ranges:
        if wanted.stop > num_bytes:
            raise short(key, wanted, num_bytes)


def short(key: str, wanted: ByteRange, num_bytes: int) -> NotFound:
    """Return the error that says that a value is shorter than it should be."""
    return NotFound(
        f"{key} has {num_bytes} bytes, bytes {wanted.offset} to {wanted.stop} were asked for: "
        "it was cut short; restore it or use another checkpoint"
    )
