"""Paths as file:// URLs and back (RFC 8089): a URL has percent escapes, a plain path never."""

import os
from urllib.parse import unquote

from checkpoint.errors import StoreRefused

_SCHEME = "file:"
_HERE = ("", "localhost")


def is_file_url(url: str) -> bool:
    """Whether a text is a URL of a file, with or without a place for a host."""
    return url.startswith(f"{_SCHEME}/")


def local_path(url: str) -> str:
    """Return the path that a file:// URL names. Raises StoreRefused if it names a host, or no path."""
    host, path = host_and_path(url)
    if host not in _HERE or not path or "\0" in path:
        what = "names no path" if host in _HERE else "names a host"
        raise StoreRefused(f"{url!r} {what}: write file:///absolute/path, with three slashes")
    return path


def host_and_path(url: str) -> tuple[str, str]:
    """Return both parts of a file:// URL, the path decoded; `?` and `#` are characters like others."""
    rest = url[len(_SCHEME) :]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", "/", rest[1:])
    return host, unquote(slash + path, errors="surrogateescape")


def file_url(path: str | os.PathLike[str]) -> str:
    """Return an absolute path as a URL, which `local_path` reads; what needs no escape stays legible."""
    return f"{_SCHEME}//{escaped(os.fspath(path))}"


def escaped(path: str) -> str:
    """Return a path, or the end of one, as a file:// URL has it."""
    return path.replace("%", "%25")
