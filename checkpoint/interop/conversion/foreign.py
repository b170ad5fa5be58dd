"""Conversions between places: a store here, a directory in some framework's format there."""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Misuse, NoSuchStep, StoreRefused
from checkpoint.interop.account import Account
from checkpoint.interop.conversion.assembling import Assembled, assembled_bytes
from checkpoint.interop.conversion.batches import most_held_bytes
from checkpoint.interop.conversion.comparing import Compared, Side, compare
from checkpoint.interop.conversion.contract import (
    ConversionReport,
    ConversionSettings,
    Listener,
    Numbering,
    unheard,
)
from checkpoint.interop.conversion.emigrating import Emigration, plan_emigration
from checkpoint.interop.conversion.exporting import export_checkpoint
from checkpoint.interop.conversion.importing import (
    Adoption,
    check_new,
    import_checkpoint,
    plan_adoption,
)
from checkpoint.interop.conversion.narrowing import narrowed
from checkpoint.interop.conversion.origins import Origin, foreign_origin, stored_origin
from checkpoint.interop.conversion.padding import padding_bytes
from checkpoint.interop.conversion.proving import held_twice, prove, shared_bytes
from checkpoint.interop.conversion.rehearsing import BlankForeign, BlankStored, rehearse_export
from checkpoint.interop.conversion.resharding import num_bytes_of
from checkpoint.interop.conversion.ruled import RuleChoice
from checkpoint.interop.conversion.sighting import sight
from checkpoint.interop.conversion.stored import Stored
from checkpoint.interop.conversion.tying import ties_of
from checkpoint.interop.conversion.writing import most_stored_bytes
from checkpoint.interop.drafting import check_free, drafting
from checkpoint.interop.formats.contract import Contents, ForeignCheckpoint
from checkpoint.interop.formats.known import FORMATS, open_foreign, open_place, write_foreign
from checkpoint.interop.moves import Foreign
from checkpoint.interop.rehearsal import rehearsing
from checkpoint.store.contract import Store
from checkpoint.store.open import open_store

_ATTEMPT_DIGITS = 24
# A writer's budget for a source at hand: what it reads stays in a core's cache until it is written.
_AT_HAND_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a checkpoint is: in a store (of which step), or in a foreign directory (its format and rules)."""

    url: str
    step: int | None = None
    format: str | None = None
    rules: RuleChoice | None = None
    numbering: Numbering = Numbering.TOLD


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor of a foreign checkpoint, as it is listed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    at: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ForeignSummary:
    """What a foreign checkpoint says of itself, and its tensors."""

    format: str
    axes: Mapping[str, int]
    step: int | None
    sizes: Mapping[str, int]
    rules: str | None
    notes: tuple[str, ...]
    plain: tuple[str, ...]
    tensors: tuple[ForeignTensor, ...]


def format_names() -> list[str]:
    """List the formats that there are."""
    return list(FORMATS)


def import_foreign(
    url: str,
    target: Store,
    adoption: Adoption,
    *,
    format: str | None = None,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> ConversionReport:
    """Import a foreign checkpoint from a URL, in the format given or the one it looks like."""
    foreign = open_foreign(url, format)
    return import_checkpoint(foreign, url, target, adoption, settings=settings, listener=listener)


def plan_import_foreign(
    url: str,
    target: Store,
    adoption: Adoption,
    *,
    format: str | None = None,
    settings: ConversionSettings | None = None,
) -> ConversionReport:
    """Tell what an import would read and write, without reading any tensor."""
    settings = settings or ConversionSettings()
    foreign = narrowed(open_foreign(url, format), adoption.only, url)
    sighted, draft = plan_adoption(foreign, url, adoption)
    check_new(target, draft)
    num_bytes = sum(map(num_bytes_of, draft.tensors))
    return ConversionReport(
        source=url,
        target=str(target),
        step=draft.step,
        layout=adoption.to,
        num_tensors=len(draft.tensors),
        num_chunks=len(draft.cuts),
        num_bytes=num_bytes,
        read_bytes=assembled_bytes(sighted.plan) + _proved_bytes(sighted.account(), foreign),
        written_bytes=most_stored_bytes(draft, settings),
        peak_bytes=most_held_bytes(draft.cuts, settings),
        is_dry=True,
        is_exact=False,
        notes=(*foreign.about.notes, *sighted.notes),
    )


def export_foreign(
    source: Whereabouts,
    url: str,
    emigration: Emigration,
    *,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> ConversionReport:
    """Export a checkpoint to a new directory, whole, durable and proved by reading it back, or not at all.

    A foreign source goes straight into the other format.
    """
    settings = settings or ConversionSettings()
    began_s = time.monotonic()
    checkpoint = _opened(source)
    origin = _origin_of(checkpoint, source)
    outward = plan_emigration(origin, emigration, _holds_optimizer)
    most_bytes = _most_bytes(origin, settings)
    with drafting(url, outward.attempt[:_ATTEMPT_DIGITS]) as draft, ExitStack() as opened:
        draft.num_threads = settings.num_workers

        def write(contents: Contents) -> None:
            write_foreign(emigration.format, draft, contents, most_bytes)

        def reopen() -> ForeignCheckpoint:
            place = opened.enter_context(draft.proving())
            there.append(sum(place.files.values()))
            return open_place(place, emigration.format)

        there: list[int] = []
        report = export_checkpoint(outward, url, write, reopen, settings=settings, listener=listener)
    return replace(
        report,
        written_bytes=draft.num_bytes,
        num_resumed_bytes=there[-1] - draft.num_bytes,
        seconds=time.monotonic() - began_s,
    )


def plan_export_foreign(
    source: Whereabouts,
    url: str,
    emigration: Emigration,
    *,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> ConversionReport:
    """Tell what an export would read and write, headers, padding and all; nothing of any tensor is read.

    Raises AlreadyExists, StoreRefused if there is something at its target already, or can be nothing.
    """
    settings = settings or ConversionSettings()
    draft = rehearsing()
    draft.num_threads = settings.num_workers
    opened = _opened(source)
    blank = BlankStored(opened) if isinstance(opened, Stored) else BlankForeign(opened)
    origin = _origin_of(blank, source)
    outward = plan_emigration(origin, emigration, _holds_optimizer)
    check_free(url, outward.attempt[:_ATTEMPT_DIGITS])
    most_bytes = _most_bytes(origin, settings)
    read_bytes = rehearse_export(
        outward,
        lambda contents: write_foreign(emigration.format, draft, contents, most_bytes),
        settings=settings,
        listener=listener,
    )
    num_bytes = sum(num_bytes_of(one) for one in outward.contents.tensors)
    return ConversionReport(
        source=origin.url,
        target=url,
        step=origin.step,
        layout=emigration.to,
        num_tensors=len(outward.contents.tensors),
        num_chunks=len(outward.plan.foreign),
        num_bytes=num_bytes,
        read_bytes=read_bytes,
        written_bytes=draft.num_bytes,
        peak_bytes=outward.most_held_bytes(settings),
        is_dry=True,
        notes=outward.notes,
    )


def look_at_foreign(url: str, format: str | None = None) -> ForeignSummary:
    """Return what a foreign checkpoint holds. Raises Unsupported if it looks like no known format."""
    foreign = open_foreign(url, format)
    about = foreign.about
    tensors = tuple(
        ForeignTensor(one.name, one.dtype, one.shape, _num_bytes(one), one.at) for one in foreign.tensors
    )
    return ForeignSummary(
        about.format,
        about.axes,
        about.step,
        about.sizes,
        about.rules,
        about.notes,
        tuple(about.extra),
        tensors,
    )


def compare_places(
    first: Whereabouts,
    second: Whereabouts,
    *,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> list[Compared]:
    """Compare two checkpoints, each a stored or a foreign one, tensor by tensor under universal names.

    Raises Mismatch naming a tensor whose copies on several ranks of one of them differ, Corrupt for a file
    that is not what its checksums say.
    """
    settings = settings or ConversionSettings()
    one, other = _side(first, settings), _side(second, settings)
    return compare(one, other, settings=settings, listener=listener)


def is_store(url: str) -> bool:
    """Whether there is a store with checkpoints at a URL; a single file is none."""
    try:
        return bool(Catalog(open_store(url)).steps())
    except StoreRefused:
        return False


def _opened(place: Whereabouts) -> Stored | ForeignCheckpoint:
    """Open what an export is made of."""
    if place.format is None and is_store(place.url):
        if place.rules is not None or place.numbering is not Numbering.TOLD:
            raise Misuse(
                f"{place.url} is a store, whose names and order are known: leave out what is for a foreign "
                "source (--source-rules, --source-set, --by-order)"
            )
        return Stored(open_store(place.url), place.step)
    _check_stepless(place)
    return open_foreign(place.url, place.format)


def _origin_of(opened: Stored | BlankStored | ForeignCheckpoint, place: Whereabouts) -> Origin:
    if isinstance(opened, Stored | BlankStored):
        return stored_origin(opened)
    return foreign_origin(opened, place.url, place.rules, place.numbering)


def _most_bytes(origin: Origin, settings: ConversionSettings) -> int:
    return min(settings.budget_bytes, _AT_HAND_BYTES if origin.is_at_hand else sys.maxsize)


def _check_stepless(place: Whereabouts) -> None:
    if place.step is not None:
        raise NoSuchStep(f"{place.url} is no store of checkpoints, so it has no step {place.step}")


def _side(place: Whereabouts, settings: ConversionSettings) -> Side:
    if place.format is None and is_store(place.url):
        stored = Stored(open_store(place.url), place.step)
        known = {one.name: one.fingerprint for one in stored.manifest.tensors}
        return Side(stored, known, ties_of(stored.manifest.skeleton))
    _check_stepless(place)
    foreign = open_foreign(place.url, place.format)
    sighted = sight(foreign, place.rules)
    account = sighted.account()
    copied = prove(account.only(held_twice(account)), foreign, settings)  # that copies are equal
    return Side(Assembled(foreign, sighted.plan), copied, sighted.ties, foreign.settle)


def _holds_optimizer(format: str) -> bool:
    return format not in FORMATS or FORMATS[format].holds_optimizer


def _proved_bytes(account: Account, foreign: ForeignCheckpoint) -> int:
    return shared_bytes(account, foreign) + padding_bytes(account, foreign)


def _num_bytes(one: Foreign) -> int:
    return num_bytes_of(TensorSpec(one.name, one.dtype, one.shape))
