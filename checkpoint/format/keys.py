"""Every name a checkpoint gives to an object, and how to read it back."""

import re
from dataclasses import dataclass

from checkpoint.errors import Corrupt, FormatError

MANIFESTS = "manifests/"
PACKS = "packs/"
INDEX = "index/"
GENERATIONS = "control/generations/"
DAMAGED = "control/damaged/"

MAX_STEP = 10**12 - 1
MAX_GENERATION = 10**6 - 1
_MAX_KEY_LENGTH = 512
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)
_HOST = re.compile(r"[a-z0-9]{1,32}", re.ASCII)
_MANIFEST_KEY = re.compile(r"manifests/([0-9]{12})", re.ASCII)
_PACK_KEY = re.compile(r"packs/([0-9]{6})-([a-z0-9]{1,32})-([0-9]{6})", re.ASCII)
_PAGE_KEY = re.compile(r"index/([0-9]{6})-([0-9]{12})-([a-z0-9]{1,32})-([0-9]{4})", re.ASCII)
_GENERATION_KEY = re.compile(r"control/generations/([0-9]{6})", re.ASCII)


@dataclass(frozen=True, slots=True)
class PackKey:
    """What a pack's key says."""

    generation: int
    host: str
    seq: int


@dataclass(frozen=True, slots=True)
class PageKey:
    """What an index page's key says."""

    generation: int
    step: int
    host: str
    seq: int


def manifest_key(step: int) -> str:
    """Return the key of a step's manifest: the same on every tier, so that a step exists once."""
    return f"{MANIFESTS}{_number(step, 12, 'step')}"


def pack_key(generation: int, host: str, seq: int) -> str:
    """Return the key of the seq-th pack that a host writes in a generation."""
    return f"{PACKS}{_number(generation, 6, 'generation')}-{_host(host)}-{_number(seq, 6, 'pack number')}"


def page_key(generation: int, step: int, host: str, seq: int) -> str:
    """Return the key of the seq-th index page of a host for a step: its receipt."""
    return f"{pages_prefix(generation, step)}{_host(host)}-{_number(seq, 4, 'page number')}"


def pages_prefix(generation: int, step: int) -> str:
    """Return what the keys of all hosts' pages for a step begin with."""
    return f"{INDEX}{_number(generation, 6, 'generation')}-{_number(step, 12, 'step')}-"


def generation_key(generation: int) -> str:
    """Return the key whose creation claims a generation."""
    return f"{GENERATIONS}{_number(generation, 6, 'generation')}"


def damaged_key(step: int, digest: str) -> str:
    """Return the key for what stood as a step's manifest when it was set aside; `digest` is of its bytes."""
    return f"{DAMAGED}{_number(step, 12, 'step')}-{digest[:16]}"


def parse_manifest_key(key: str) -> int | None:
    """Return the step of a manifest's key; None if it is no such key."""
    found = _MANIFEST_KEY.fullmatch(key)
    return int(found[1]) if found else None


def parse_pack_key(key: str) -> PackKey | None:
    """Return what a pack's key says; None if it is no such key."""
    found = _PACK_KEY.fullmatch(key)
    return PackKey(int(found[1]), found[2], int(found[3])) if found else None


def parse_page_key(key: str) -> PageKey | None:
    """Return what a page's key says; None if it is no such key."""
    found = _PAGE_KEY.fullmatch(key)
    return PageKey(int(found[1]), int(found[2]), found[3], int(found[4])) if found else None


def parse_generation_key(key: str) -> int | None:
    """Return the generation that a key claims; None if it is no such key."""
    found = _GENERATION_KEY.fullmatch(key)
    return int(found[1]) if found else None


def check_key(key: object, where: str) -> str:
    """Return a key that was read from a checkpoint, if it is one that can be asked for.

    Raises Corrupt for anything that could lead out of the store.
    """
    if not isinstance(key, str) or len(key) > _MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise Corrupt(f"{where} names an object that no store can hold: {str(key)[:80]!r}")
    return key


def _number(value: int, digits: int, what: str) -> str:
    if not 0 <= value < 10**digits:
        raise FormatError(f"{what} {value} does not fit into {digits} digits")
    return f"{value:0{digits}d}"


def _host(host: str) -> str:
    if not _HOST.fullmatch(host):
        raise FormatError(f"a host is called [a-z0-9] with 1 to 32 letters in keys, not {host!r}")
    return host
