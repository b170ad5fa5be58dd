"""Whether two URLs mean one place, however they are spelled, or one within the other."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from checkpoint.store.obstore import PREFIX
from checkpoint.store.paths import host_and_path

_LOCAL = ("file", "local")
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
_SLASHES = re.compile(r"/+")


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a URL leads: what kind of thing, on which host or in which bucket, and the way from its root."""

    scheme: str
    host: str
    way: tuple[str, ...]

    def holds(self, other: "_Spot") -> bool:
        """Whether the other one is here, or further within."""
        same_root = (self.scheme, self.host) == (other.scheme, other.host)
        return same_root and other.way[: len(self.way)] == self.way


def check_apart(urls: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError if two places, given as (name, URL), are one, or one lies within the other."""
    spots = [(name, url, _spot(url)) for name, url in urls]
    for (name, url, spot), (other_name, other_url, other) in combinations(spots, 2):
        if spot == other:
            raise ValueError(
                f"{name} ({url}) and {other_name} ({other_url}) are the same place: each of them would prune "
                "the other; give each its own"
            )
        if spot.holds(other) or other.holds(spot):
            inner, outer = (other_name, name) if spot.holds(other) else (name, other_name)
            raise ValueError(
                f"{inner} lies within {outer} ({url} and {other_url}): put them side by side, "
                "for neither may delete what is the other's"
            )


def _spot(url: str) -> _Spot:
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower().removeprefix(PREFIX)
    if not separator or scheme in _LOCAL:
        path = host_and_path(f"file://{rest}")[1] if separator else url.strip()
        return _Spot("file", "", Path(os.path.realpath(Path(path).expanduser())).parts)
    if scheme == "memory":
        return _Spot(scheme, rest, ("",))  # a name, not a path
    host, _, path = rest.partition("/")
    way = os.path.normpath(_SLASHES.sub("/", f"/{path}")).strip("/")
    return _Spot(_ALIASES.get(scheme, scheme), host.lower(), tuple(way.split("/")) if way else ())
