"""Importing: a foreign checkpoint as a universal one, which a Checkpointer restores like any of its own."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpoint.engine.catalog import Catalog
from checkpoint.errors import AlreadyExists, FormatError, Mismatch, Misuse
from checkpoint.format.codec import checksum
from checkpoint.format.keys import MAX_STEP
from checkpoint.format.scheme import format_layout, parse_layout
from checkpoint.format.texts import MAX_TEXT
from checkpoint.interop.account import Account
from checkpoint.interop.conversion.assembling import Assembled
from checkpoint.interop.conversion.batches import most_held_bytes
from checkpoint.interop.conversion.bookkeeping import taken_over
from checkpoint.interop.conversion.casting import Reach
from checkpoint.interop.conversion.contract import (
    ConversionReport,
    ConversionSettings,
    Listener,
    Numbering,
    Progress,
    Proof,
    unheard,
)
from checkpoint.interop.conversion.finding import check_own
from checkpoint.interop.conversion.marking import Counted
from checkpoint.interop.conversion.measuring import high_water_bytes
from checkpoint.interop.conversion.names import from_foreign
from checkpoint.interop.conversion.narrowing import narrowed
from checkpoint.interop.conversion.padding import look_at_padding
from checkpoint.interop.conversion.proving import changed, prove
from checkpoint.interop.conversion.resharding import ONE_RANK, layout_meta
from checkpoint.interop.conversion.roles import lay_out, pieces_of
from checkpoint.interop.conversion.ruled import SIZES, RuleChoice, knowing, model_sizes, placements_by
from checkpoint.interop.conversion.sighting import Sighted, check_sure, sight
from checkpoint.interop.conversion.tying import Ties
from checkpoint.interop.conversion.writing import Draft, write_checkpoint
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.store.contract import Store

_DEFAULT_RUN = "run"  # as a Checkpointer calls it


@dataclass(frozen=True, slots=True)
class Adoption:
    """What a foreign checkpoint is to become: of which run and step, by which rules, cut for which layout.

    Without a step it is the foreign one's own, or 0. `ties` say which names are other names of a weight,
    `numbering` whether an optimizer that only counts its parameters is believed to count in their order,
    `only`, a glob of universal names, which of its tensors are taken.
    Raises Misuse for a step below 0, and for a run that nobody would find again.
    """

    run: str = _DEFAULT_RUN
    step: int | None = None
    rules: RuleChoice | None = None
    to: str = ONE_RANK
    ties: Ties = field(default_factory=dict)
    numbering: Numbering = Numbering.TOLD
    only: str | None = None

    def __post_init__(self) -> None:
        parts = self.run.split("/")
        if {"", ".", ".."} & set(parts) or not self.run.isprintable() or self.run != self.run.strip():
            raise Misuse(
                f"{self.run!r} cannot name a run: give the name that its Checkpointer has, with no space or "
                "'/' at its ends and no '..' in it"
            )
        if len(self.run) > MAX_TEXT:
            raise Misuse(f"a run's name of {len(self.run)} characters is too long: {MAX_TEXT} are the most")
        if self.step is not None and not 0 <= self.step <= MAX_STEP:
            raise Misuse(f"a checkpoint's step cannot be {self.step}: it is from 0 to {MAX_STEP}")


def import_checkpoint(
    foreign: ForeignCheckpoint,
    origin: str,
    target: Store,
    adoption: Adoption,
    *,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> ConversionReport:
    """Write a foreign checkpoint, opened from `origin`, to a store, as a Checkpointer would have saved it.

    Every tensor's fingerprint is worked out twice: from what was written, and from the foreign side alone.
    May be broken off anywhere and called again. Raises Mismatch naming a tensor that the rules do not cover,
    or whose proof fails; AlreadyExists if the target has another checkpoint of the step.
    """
    settings = settings or ConversionSettings()
    began_s, before = time.monotonic(), high_water_bytes()
    foreign = narrowed(foreign, adoption.only, origin)
    sighted, draft = plan_adoption(foreign, origin, adoption)
    check_new(target, draft)
    proofs: list[Proof] = []
    notes = [*foreign.about.notes, *sighted.notes]

    def check(found: Mapping[str, int]) -> None:
        listener(Progress("proving", 0, 0))
        account = sighted.account()
        proofs.extend(_held_against(account, counted, found, reach := Reach(), settings))
        notes.extend(reach.settle(settings.overflow))
        notes.extend(look_at_padding(account, counted, settings))
        foreign.settle()

    counted = Counted(foreign)
    contents = Assembled(counted, sighted.plan)
    written = write_checkpoint(target, draft, contents, settings=settings, check=check, listener=listener)
    return ConversionReport(
        source=origin,
        target=str(target),
        step=draft.step,
        layout=str(draft.meta["layout"]["scheme"]),
        num_tensors=len(draft.tensors),
        num_chunks=written.num_chunks,
        num_bytes=written.num_bytes,
        read_bytes=counted.num_bytes,
        written_bytes=written.stored_bytes,
        peak_bytes=most_held_bytes(draft.cuts, settings),
        grown_bytes=high_water_bytes() - before,
        num_resumed_bytes=written.num_resumed_bytes,
        seconds=time.monotonic() - began_s,
        proofs=tuple(proofs),
        notes=tuple(notes),
    )


def check_new(target: Store, draft: Draft) -> None:
    """See that a store can have a step, and has none of it. Raises AlreadyExists, StoreRefused, Misuse."""
    check_own(target)
    if draft.step > MAX_STEP:
        raise Misuse(f"the files say that they are of step {draft.step}, more than {MAX_STEP}: give a step")
    if draft.step in Catalog(target).steps():
        raise AlreadyExists(f"{target} has a checkpoint of step {draft.step}: give another store, or a step")


def _held_against(
    account: Account, foreign: Counted, found: Mapping[str, int], reach: Reach, settings: ConversionSettings
) -> list[Proof]:
    """Hold fingerprints against those of the foreign side. Raises Mismatch naming the tensors that differ."""
    wanted = prove(account, foreign, settings, reach)
    wrong = [name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name)]
    if wrong:
        raise Mismatch(
            f"the content of {len(wrong)} of {len(wanted)} tensors differs from the foreign checkpoint's: "
            f"{sorted(wrong)[:5]}; nothing was committed"
        )
    other = changed(account, foreign)
    return [Proof(name, "reference" if name in other else "fingerprint", wanted[name]) for name in found]


def plan_adoption(foreign: ForeignCheckpoint, origin: str, adoption: Adoption) -> tuple[Sighted, Draft]:
    """Work out what a foreign checkpoint becomes, before anything is read of its tensors."""
    about = foreign.about
    doubts = about.doubts if adoption.numbering is Numbering.TOLD else ()
    names = [from_foreign(one.name) for one in foreign.tensors]
    check_sure(names, (doubts, about.untold), origin)
    if not foreign.tensors:
        raise FormatError(f"{origin} holds no tensors: there is nothing to import")
    sighted = sight(foreign, adoption.rules, adoption.ties)
    specs = sighted.plan.tensors
    scheme = parse_layout(adoption.to)
    sizes = model_sizes(about.sizes, adoption.rules.sizes if adoption.rules else {})
    is_cut = adoption.rules is not None and scheme.mesh.size > 1
    on = placements_by(knowing(adoption.rules, sizes), specs, scheme) if adoption.rules and is_cut else None
    layout = lay_out(specs, scheme, on)
    told = [[one.name, one.dtype, list(one.shape), dict(one.at)] for one in foreign.tensors]
    meta = {
        **layout_meta(layout, format_layout(scheme)),
        "converted": {
            "by": "import",
            "from": origin,
            "format": about.format,
            "axes": dict(about.axes),
            "rules": adoption.rules.rules.name if adoption.rules else None,
        },
        **({SIZES: sizes} if sizes else {}),
        **taken_over(about.extra),
    }
    draft = Draft(
        run=adoption.run,
        step=next((step for step in (adoption.step, about.step) if step is not None), 0),
        tensors=specs,
        skeleton=sighted.skeleton,
        meta=meta,
        pieces=tuple(pieces_of(layout, specs)),
        origin=checksum(json.dumps([origin, told]).encode()).hex(),
    )
    return sighted, draft
