"""A store behind any fsspec URL, S3 first: what the client libraries do and say, turned into the contract."""

import inspect
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

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

_S3 = ("s3", "s3a")
_S3_PART_BYTES = 16 << 20
_S3_CONNECT_TIMEOUT_S, _S3_READ_TIMEOUT_S = 10, 30
_S3_SLOWEST_BYTES_PER_S = 1 << 20
_INCOMING = ".incoming"
_TAKEN = {"PreconditionFailed", "412"}
_REFUSED_CODES = {
    *("NoSuchBucket", "InvalidBucketName", "AccessDenied", "AllAccessDisabled", "QuotaExceeded", "403"),
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
}
_REFUSED_TYPES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")

_turns: dict[str, threading.Lock] = {}
_turns_lock = threading.Lock()


class ObjectStore:
    """Values as objects under a URL. The client is built on first use, once per process; it is never pickled.

    Where the client sends conditional writes, `put_new` is one of them, in a single request; elsewhere (plain
    file systems) it takes turns with this process's other threads, and other processes have to stay away.
    """

    def __init__(self, url: str) -> None:
        self._url = check_url(url)
        self._protocol = url.partition("://")[0]
        self._lock = threading.Lock()
        self._client: tuple[int, Any] | None = None

    def __str__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str]]:
        return ObjectStore, (self._url,)

    def put_new(self, key: str, data: Data) -> None:
        """Write the value only if the key is free."""
        path, body = self._path(key), joined(data)
        with self._told("write", key):
            client = self._fs()
            if _is_conditional(client):
                # One request, however large: a multipart upload's last one is not conditional on every store.
                client.pipe_file(path, body, mode="create", **self._limits(body, len(body) + 1))
                return
            with self._turn():
                if client.exists(path):
                    raise AlreadyExists(f"{key} exists already in {self}; nothing was written")
                self._replace(client, path, body)

    def put(self, key: str, data: Data) -> None:
        """Write the value."""
        path, body = self._path(key), joined(data)
        with self._told("write", key):
            client = self._fs()
            if _is_conditional(client):
                client.pipe_file(path, body, **self._limits(body, _S3_PART_BYTES))
            else:
                self._replace(client, path, body)

    def read(self, key: str, ranges: Sequence[ByteRange] | None = None) -> list[Buffer]:
        """Return the ranges, fetched side by side, or the whole value."""
        path = self._path(key)
        with self._told("read", key):
            if ranges is None:
                return [self._fs().cat_file(path)]
            asked = [part for part in ranges if part.num_bytes]
            starts, stops = [part.offset for part in asked], [part.stop for part in asked]
            found = (
                self._fs().cat_ranges([path] * len(asked), starts, stops, on_error="raise") if asked else []
            )
            for part, data in zip(asked, found, strict=True):
                if len(data) != part.num_bytes:
                    raise short(key, part, part.offset + len(data))
            answers = iter(found)
            return [next(answers) if part.num_bytes else b"" for part in ranges]

    def list(self, prefix: str) -> list[Entry]:
        """List the keys that begin with the prefix, as the store knows them now."""
        folder, _, name = check_prefix(prefix).rpartition("/")
        with self._told("list", prefix):
            client = self._fs()
            root = str(client._strip_protocol(self._url))
            narrowed = {"prefix": name} if self._protocol in _S3 and name else {}
            try:
                found = client.find(f"{root}/{folder}" if folder else root, detail=True, **narrowed)
            except FileNotFoundError as error:
                if _code(error) in _REFUSED_CODES:
                    raise
                found = {}
        entries = (_entry(path[len(root) :].lstrip("/"), info) for path, info in found.items())
        # What is put first while it is listed, s3fs lists as the root itself: no key.
        keyed = (entry for entry in entries if entry.key and "/." not in f"/{entry.key}")
        return sorted((entry for entry in keyed if entry.key.startswith(prefix)), key=lambda one: one.key)

    def delete(self, key: str) -> None:
        """Remove the object."""
        path = self._path(key)
        with self._told("delete", key), suppress(FileNotFoundError):
            self._fs().rm_file(path)

    def _path(self, key: str) -> str:
        return f"{self._url}/{check_key(key)}"

    def _fs(self) -> Any:
        """Return this process's client: an inherited one would hang or be refused after a fork."""
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                self._client = os.getpid(), self._build()
            return self._client[1]

    def _build(self) -> Any:
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if self._protocol in _S3:
            options["config_kwargs"] = {
                "connect_timeout": _S3_CONNECT_TIMEOUT_S,
                "read_timeout": _S3_READ_TIMEOUT_S,
                "retries": {"total_max_attempts": 1},
            }
        client, _ = fsspec.core.url_to_fs(
            self._url, **options
        )  # it takes the host from the URL, if there is one
        if self._protocol in _S3:
            client.retries = 1  # one layer retries, and it is not this one
        return client

    def _limits(self, body: bytes | bytearray, part_bytes: int) -> dict[str, float]:
        """Return how a write is cut, and when it is given up: by itself the client waits for ever."""
        if self._protocol not in _S3:
            return {}
        timeout_s = _S3_READ_TIMEOUT_S + len(body) / _S3_SLOWEST_BYTES_PER_S
        return {"chunksize": part_bytes, "max_concurrency": 4, "timeout": timeout_s}

    def _replace(self, client: Any, path: str, body: bytes | bytearray) -> None:
        """Write under a name that no reader looks at, then rename."""
        incoming = f"{self._url}/{_INCOMING}/{uuid.uuid4().hex}"
        client.makedirs(incoming.rpartition("/")[0], exist_ok=True)
        client.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            client.pipe_file(incoming, body)
            client.mv(incoming, path)
        except BaseException:
            with suppress(FileNotFoundError):
                client.rm_file(incoming)
            raise

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with _turns_lock:
            turn = _turns.setdefault(self._url, threading.Lock())
        with turn:
            yield

    @contextmanager
    def _told(self, verb: str, key: str) -> Iterator[None]:
        """Say what a client library's errors mean for the store."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # every client library raises classes of its own
            raise self._translated(error, verb, key) from error

    def _translated(self, error: Exception, verb: str, key: str) -> StoreError:
        code = _code(error)
        if verb == "write" and (isinstance(error, FileExistsError) or code in _TAKEN):
            return AlreadyExists(f"{key} exists already in {self}; nothing was written")
        message = f"cannot {verb} {key!r} in {self}: {type(error).__name__}: {error}"
        is_refused = code in _REFUSED_CODES or type(error).__name__ in _REFUSED_TYPES
        if is_refused or isinstance(error, PermissionError | ImportError | ValueError | NotADirectoryError):
            return StoreRefused(
                f"{message}; check the URL, the bucket, and the credentials in the environment"
            )
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            return NotFound(f"{key} is not in {self}")
        if code == "InvalidRange":
            return NotFound(
                f"{key} in {self} is shorter than it should be: restore it or use another checkpoint"
            )
        return StoreUnavailable(message)


def _is_conditional(client: Any) -> bool:
    """Tell whether the client sends conditional writes by itself."""
    return isinstance(client, AsyncFileSystem) and "mode" in inspect.signature(client._pipe_file).parameters


def _code(error: BaseException) -> str:
    """Return the error code that an S3 server gave, if it did."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, Mapping) else ""


def _entry(key: str, info: Mapping[str, Any]) -> Entry:
    return Entry(key, int(info.get("size") or 0), _modified_s(info))


def _modified_s(info: Mapping[str, Any]) -> float:
    """Return when an object was written; infinite if unknown, so that nobody takes it for old."""
    for name in _MODIFIED:
        match info.get(name):
            case datetime() as moment:
                return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case str() as text:
                with suppress(ValueError):
                    return datetime.fromisoformat(text).timestamp()
    return float("inf")
