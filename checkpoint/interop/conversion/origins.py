"""What an export is made of: a stored checkpoint, or a foreign one that goes straight into another format."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from checkpoint.format.codec import checksum
from checkpoint.format.manifest import Manifest, encode_manifest
from checkpoint.format.tree import unflatten
from checkpoint.interop.conversion.assembling import Assembled
from checkpoint.interop.conversion.bookkeeping import books_of
from checkpoint.interop.conversion.casting import Reach
from checkpoint.interop.conversion.contract import ConversionSettings, GlobalTensors, Numbering
from checkpoint.interop.conversion.marking import Marked
from checkpoint.interop.conversion.ruled import RuleChoice, model_sizes, sizes_in
from checkpoint.interop.conversion.sighting import EXTRA, MODEL, OTHER, sight
from checkpoint.interop.conversion.tying import TIED, Ties, ties_of
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.interop.place import is_here
from checkpoint.store.contract import Store

_TENSOR = object()


@dataclass(frozen=True, slots=True)
class Origin:
    """Global tensors by their universal names, and what is told besides.

    `digest` identifies it; `fingerprints` are those of the tensors named, known or worked out from it.
    Of those that are `changed` rules cast or average the values as they are read.
    `padding` reads what of it is beyond the end of tensors, and tells of it; `settle` sees that what was
    read is what checksums in its files say. `num_read_bytes` tells how much
    of it was read so far. `sizes` are what rules may know of the model.
    `doubts` are parameters whose optimizer states could be another's. Of one that `is_at_hand` small parts
    are read as cheaply as large ones.
    """

    url: str
    step: int
    digest: str
    contents: GlobalTensors
    extra: Mapping[str, Any]
    fingerprints: Callable[[Collection[str], ConversionSettings, Reach], Mapping[str, int]]
    num_read_bytes: Callable[[], int]
    changed: Collection[str] = ()
    ties: Ties = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubts: tuple[tuple[str, ...], ...] = ()
    untold: str = ""
    padding: Callable[[ConversionSettings], Sequence[str]] = lambda _: ()
    settle: Callable[[], None] = lambda: None
    is_at_hand: bool = False


class StoredContents(GlobalTensors, Protocol):
    """A checkpoint of a store: its tensors, the manifest that they are by, and how much of it was read."""

    store: Store
    manifest: Manifest

    @property
    def read_bytes(self) -> int:
        """How many bytes were read of packs so far."""


def stored_origin(stored: StoredContents) -> Origin:
    """Return a stored checkpoint as what an export is made of."""
    manifest = stored.manifest
    known = {one.name: one.fingerprint for one in manifest.tensors}
    return Origin(
        url=str(stored.store),
        step=manifest.step,
        digest=checksum(encode_manifest(manifest)).hex(),
        contents=stored,
        extra={**_plain_parts(unflatten(manifest.skeleton, _Tensors())), **books_of(manifest)},
        ties=ties_of(manifest.skeleton),
        sizes=sizes_in(manifest),
        fingerprints=lambda *_: known,
        num_read_bytes=lambda: stored.read_bytes,
    )


def foreign_origin(
    foreign: ForeignCheckpoint,
    url: str,
    rules: RuleChoice | None,
    numbering: Numbering = Numbering.TOLD,
) -> Origin:
    """Return an opened foreign checkpoint as what an export is made of; nothing is stored in between."""
    about = foreign.about
    sighted = sight(foreign, rules)
    told = [[one.name, one.dtype, list(one.shape), dict(one.at)] for one in foreign.tensors]
    marked = Marked(foreign, sighted.account())
    return Origin(
        url=url,
        step=about.step or 0,
        digest=checksum(json.dumps([url, told]).encode()).hex(),
        contents=Assembled(marked, sighted.plan),
        extra={**_untied(about.extra), **sighted.extra},
        fingerprints=marked.fingerprints,
        changed=marked.changed,
        padding=marked.padding,
        settle=foreign.settle,
        num_read_bytes=lambda: marked.num_read_bytes,
        ties=sighted.ties,
        sizes=model_sizes(about.sizes, rules.sizes if rules else {}),
        notes=(*about.notes, *sighted.notes),
        doubts=() if numbering is Numbering.BY_ORDER else about.doubts,
        untold=about.untold,
        is_at_hand=is_here(url),
    )


def _untied(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data without the ties that it tells: some may be of weights that are not there."""
    return {key: value for key, value in extra.items() if key != TIED or not isinstance(value, dict)}


class _Tensors(dict[str, object]):
    """Has a mark in the place of every tensor."""

    def __missing__(self, _: str) -> object:
        return _TENSOR


def _plain_parts(state: Any) -> dict[str, Any]:
    """Return what of a state is no tensor, by the names that an import would give it."""
    plain = _without_tensors(state)
    if not isinstance(plain, dict):
        return {}
    extra = plain.get(EXTRA)
    if not isinstance(extra, dict) or not extra.keys() <= {MODEL, OTHER}:
        return plain  # somebody's own of that name, if anything
    return {**{name: value for name, value in plain.items() if name != EXTRA}, **extra}


def _without_tensors(node: Any) -> Any:
    """Return a state without its tensors; a dict that held nothing else goes with them."""
    if isinstance(node, dict):
        pairs = [(name, _without_tensors(value)) for name, value in node.items()]
        some = {name: value for name, value in pairs if value is not _TENSOR}
        return some if some or not node else _TENSOR
    if isinstance(node, list | tuple):
        items = [_without_tensors(value) for value in node]
        if items and all(item is _TENSOR for item in items):
            return _TENSOR
        return type(node)(None if item is _TENSOR else item for item in items)
    return node
