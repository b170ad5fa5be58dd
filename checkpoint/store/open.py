"""From a URL to a store, and a store put to the proof."""

import re
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import AlreadyExists, StoreError, StoreRefused
from checkpoint.store.contract import Store
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from checkpoint.store.obstore import PREFIX, ObStore
from checkpoint.store.paths import local_path
from checkpoint.store.wrappers import Retrying

_lock = threading.Lock()
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_READ_ONLY = ("http", "https", "data", "gist", "git", "github", "libarchive", "tar", "zip")  # in fsspec
_FIRST, _SECOND = b"first", b"second"
_memory: dict[str, MemoryStore] = {}


@dataclass(frozen=True, slots=True)
class Probe:
    """What a store can do, as found by asking it. `problem` is empty if it can do all that a run needs.

    `is_conditional` tells that `put_new` left a value alone that was there before. That it admits exactly one
    of many writers in a race, no probe from one place can prove: docs/format.md names the stores that do.
    """

    url: str
    is_readable: bool
    is_writable: bool
    is_conditional: bool
    seconds: float
    problem: str


def open_store(url: str) -> Store:
    """Return the store that a URL names; nothing is read or written yet.

    A plain path (`~` is the home directory) or `file://` (with percent escapes) is a directory, which the
    first write creates; `memory://name` lives in this process; anything else is a URL that fsspec knows
    (`s3://bucket/prefix`), or one for obstore, the optional faster client (`obstore+s3://bucket/prefix`).
    Their requests are tried again while it is unavailable. Credentials come from the environment, as the
    client reads it.

    Raises StoreRefused for a URL that names no store.
    """
    scheme, separator, rest = url.partition("://")
    if not url or (separator and not scheme):
        raise StoreRefused(f"{url!r} names no store: give a path or a URL like s3://bucket/prefix")
    if typo := _ONE_SLASH.match(url):
        raise StoreRefused(f"{url!r} names no store: write {typo[1].lower()}://, with two slashes")
    if not separator:
        return LocalStore(Path(url).expanduser())
    match scheme:
        case _ if scheme.lower() in _READ_ONLY:
            raise StoreRefused(
                f"{url!r} names no store: nothing can be written through {scheme}://; give a path, or a URL "
                "like s3://bucket/prefix (a server that speaks S3 is named by AWS_ENDPOINT_URL)"
            )
        case "file":
            return LocalStore(local_path(url))
        case "memory":
            return _memory_store(rest)
        case _ if scheme.startswith(PREFIX):
            return Retrying(ObStore(url))
        case _:
            from checkpoint.store.objects import ObjectStore  # noqa: PLC0415 -- whose client takes 4 MiB

            return Retrying(ObjectStore(url))


def probe(store: Store) -> Probe:
    """Write, read, list and remove a few bytes under `control/probe/`, and tell what the store made of it."""
    key = f"control/probe/{uuid.uuid4().hex}"
    began_s = time.monotonic()
    is_writable = is_readable = is_conditional = False
    problem = ""
    try:
        store.put_new(key, _FIRST)
        is_writable = True
        is_readable = _is_there(store, key)
        with suppress(AlreadyExists):
            store.put_new(key, _SECOND)
        is_conditional = is_readable and _is_there(store, key)
    except StoreError as error:
        problem = str(error)
    else:
        if not is_readable:
            problem = f"{store} does not list or return what was just written: use one that is consistent"
        elif not is_conditional:
            problem = f"{store} overwrites what put_new must leave alone: let one host write, and nobody else"
    seconds = time.monotonic() - began_s
    with suppress(StoreError):
        store.delete(key)
    return Probe(str(store), is_readable, is_writable, is_conditional, seconds, problem)


def _memory_store(name: str) -> MemoryStore:
    with _lock:
        return _memory.setdefault(name, MemoryStore(name))


def _is_there(store: Store, key: str) -> bool:
    return [entry.key for entry in store.list(key)] == [key] and bytes(store.read(key)[0]) == _FIRST
