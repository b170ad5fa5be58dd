"""Every name a checkpoint gives to an object, and how to read it back."""

import re
from dataclasses import dataclass

from checkpoint.errors import Corrupt, FormatError

MANIFESTS = "manifests/"
PACKS = "packs/"
INDEX = "index/"
CONTROL = "control/"
GENERATIONS = "control/generations/"
ABANDONED = "control/abandoned/"
DAMAGED = "control/damaged/"
EXPIRED = "control/expired/"
SCORES = "control/scores/"
TAGS = "control/tags/"
VERIFIED = "control/verified/"
PROMOTING = "control/promoting/"
SWEEPS = "control/sweeps/"

MAX_STEP = 10**12 - 1
MAX_GENERATION = 10**6 - 1
MAX_PACK_SEQ = 10**6 - 1
_MAX_KEY_LENGTH = 512
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)
_HOST = re.compile(r"[a-z0-9]{1,32}", re.ASCII)
_LIFE = re.compile(r"[0-9a-f]{16}", re.ASCII)
_MANIFEST_KEY = re.compile(r"manifests/([0-9]{12})", re.ASCII)
_PACK_KEY = re.compile(r"packs/([0-9]{6})-([a-z0-9]{1,32})(?:-([0-9a-f]{16}))?-([0-9]{6})", re.ASCII)
_PAGE_KEY = re.compile(
    r"index/([0-9]{6})-([0-9]{12})-([a-z0-9]{1,32})(?:-([0-9a-f]{16}))?-([0-9]{4})", re.ASCII
)
_TAG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
_STEP_AND_DIGEST = re.compile(r"([0-9]{12})-([0-9a-f]{16})", re.ASCII)
_GENERATION_KEY = re.compile(r"control/generations/([0-9]{6})", re.ASCII)


@dataclass(frozen=True, slots=True)
class PackKey:
    """What a pack's key says."""

    generation: int
    host: str
    seq: int
    life: str = ""


@dataclass(frozen=True, slots=True)
class PageKey:
    """What an index page's key says."""

    generation: int
    step: int
    host: str
    seq: int
    life: str = ""


@dataclass(frozen=True, slots=True)
class StepKey:
    """What a key says that belongs to one manifest: its step, and how the checksum of its bytes begins."""

    step: int
    digest: str


def manifest_key(step: int) -> str:
    """Return the key of a step's manifest: the same on every tier, so that a step exists once."""
    return f"{MANIFESTS}{_number(step, 12, 'step')}"


def pack_key(generation: int, host: str, seq: int, life: str = "") -> str:
    """Return the key of the seq-th pack that a host writes in a generation and a life of its own.

    No other life has its number, which is drawn: so no key is used again once its pack is gone.
    """
    number = _number(seq, 6, "pack number")
    return f"{PACKS}{_number(generation, 6, 'generation')}-{_writer(host, life)}-{number}"


def page_key(generation: int, step: int, host: str, seq: int, life: str = "") -> str:
    """Return the key of the seq-th index page of a host for a step; the receipt's has no life in it."""
    return f"{pages_prefix(generation, step)}{_writer(host, life)}-{_number(seq, 4, 'page number')}"


def pages_prefix(generation: int, step: int) -> str:
    """Return what the keys of all hosts' pages for a step begin with."""
    return f"{INDEX}{_number(generation, 6, 'generation')}-{_number(step, 12, 'step')}-"


def generation_key(generation: int) -> str:
    """Return the key whose creation claims a generation."""
    return f"{GENERATIONS}{_number(generation, 6, 'generation')}"


def damaged_key(step: int, digest: str) -> str:
    """Return the key for what stood as a step's manifest when it was set aside; `digest` is of its bytes."""
    return f"{DAMAGED}{_step_and_digest(step, digest)}"


def abandoned_key(step: int, digest: str) -> str:
    """Return the key for a sound manifest that training went back behind; `digest` is of its bytes."""
    return f"{ABANDONED}{_step_and_digest(step, digest)}"


def expired_key(step: int, digest: str) -> str:
    """Return the key where an expired manifest awaits the sweep of its objects; `digest` is of its bytes."""
    return f"{EXPIRED}{_step_and_digest(step, digest)}"


def score_key(step: int, digest: str) -> str:
    """Return the key for what was found out about a checkpoint later; `digest` is of its manifest's bytes."""
    return f"{SCORES}{_step_and_digest(step, digest)}"


def verified_key(step: int, digest: str) -> str:
    """Return the key that records that a checkpoint was read back and proved; `digest` is of its manifest."""
    return f"{VERIFIED}{_step_and_digest(step, digest)}"


def promoting_key(step: int, digest: str) -> str:
    """Return the key where a manifest announces, on its target, a promotion under way."""
    return f"{PROMOTING}{_step_and_digest(step, digest)}"


def sweep_key(digest: str) -> str:
    """Return the key of a list of objects that are about to be deleted; `digest` is of its bytes."""
    return f"{SWEEPS}{digest[:16]}"


def tag_key(name: str) -> str:
    """Return the key of a tag: a name that a person gives to a step."""
    if not _TAG.fullmatch(name):
        raise FormatError(
            f"a tag is 1 to 64 of A-Z a-z 0-9 . _ - and does not begin with a dot: not {name!r}"
        )
    return f"{TAGS}{name}"


def parse_manifest_key(key: str) -> int | None:
    """Return the step of a manifest's key; None if it is no such key."""
    found = _MANIFEST_KEY.fullmatch(key)
    return int(found[1]) if found else None


def parse_pack_key(key: str) -> PackKey | None:
    """Return what a pack's key says; None if it is no such key."""
    found = _PACK_KEY.fullmatch(key)
    return PackKey(int(found[1]), found[2], int(found[4]), found[3] or "") if found else None


def parse_page_key(key: str) -> PageKey | None:
    """Return what a page's key says; None if it is no such key."""
    found = _PAGE_KEY.fullmatch(key)
    if not found:
        return None
    return PageKey(int(found[1]), int(found[2]), found[3], int(found[5]), found[4] or "")


def is_object_key(key: str) -> bool:
    """Whether a key is one that a pack, a page or a receipt can have."""
    return bool(_PACK_KEY.fullmatch(key) or _PAGE_KEY.fullmatch(key))


def parse_generation_key(key: str) -> int | None:
    """Return the generation that a key claims; None if it is no such key."""
    found = _GENERATION_KEY.fullmatch(key)
    return int(found[1]) if found else None


def parse_expired_key(key: str) -> StepKey | None:
    """Return what the key of an expired manifest says; None if it is no such key."""
    return _parse_step_and_digest(key, EXPIRED)


def parse_verified_key(key: str) -> StepKey | None:
    """Return what the key of a proof says; None if it is no such key."""
    return _parse_step_and_digest(key, VERIFIED)


def parse_tag_key(key: str) -> str | None:
    """Return the name of a tag's key; None if it is no such key."""
    name = key.removeprefix(TAGS)
    return name if name != key and _TAG.fullmatch(name) else None


def check_key(key: object, where: str) -> str:
    """Return a key that was read from a checkpoint, if it is one that can be asked for.

    Raises Corrupt for anything that could lead out of the store.
    """
    if not isinstance(key, str) or len(key) > _MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        said = ascii(key)[:80] if isinstance(key, str) else f"a {type(key).__name__}"
        raise Corrupt(f"{where} names an object that no store can hold: {said}")
    return key


def _step_and_digest(step: int, digest: str) -> str:
    return f"{_number(step, 12, 'step')}-{digest[:16]}"


def _parse_step_and_digest(key: str, prefix: str) -> StepKey | None:
    found = _STEP_AND_DIGEST.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    return StepKey(int(found[1]), found[2]) if found else None


def _number(value: int, digits: int, what: str) -> str:
    if not 0 <= value < 10**digits:
        raise FormatError(f"{what} {value} does not fit into {digits} digits")
    return f"{value:0{digits}d}"


def _writer(host: str, life: str) -> str:
    if not _HOST.fullmatch(host):
        raise FormatError(f"a host is called [a-z0-9] with 1 to 32 letters in keys, not {host!r}")
    if life and not _LIFE.fullmatch(life):
        raise FormatError(f"a life is called by 16 hex digits in keys, not {life!r}")
    return f"{host}-{life}" if life else host
