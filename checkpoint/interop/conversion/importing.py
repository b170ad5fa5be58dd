"""Importing: a foreign checkpoint as a universal one, which a Checkpointer restores like any of its own."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import AlreadyExists, FormatError, Mismatch, Misuse, Unsupported
from checkpoint.format.codec import checksum
from checkpoint.format.scheme import format_layout, parse_layout
from checkpoint.format.tree import flatten
from checkpoint.interop.conversion.assembling import Assembled, as_they_are
from checkpoint.interop.conversion.batches import cuts_of, most_held_bytes
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
from checkpoint.interop.conversion.marking import Counted
from checkpoint.interop.conversion.measuring import high_water_bytes
from checkpoint.interop.conversion.names import from_foreign, from_rules
from checkpoint.interop.conversion.proving import changed, check_described, look_at_padding, prove
from checkpoint.interop.conversion.resharding import ONE_RANK, layout_meta
from checkpoint.interop.conversion.roles import lay_out, owner_of, pieces_of
from checkpoint.interop.conversion.ruled import SIZES, RuleChoice, knowing, model_sizes, placements_by
from checkpoint.interop.conversion.tying import TIED, Ties, merged, tie, universal
from checkpoint.interop.conversion.writing import Draft, write_checkpoint
from checkpoint.interop.expression import Size
from checkpoint.interop.formats.contract import LEAST_VOCAB, About, ForeignCheckpoint
from checkpoint.interop.formats.numbered import listed
from checkpoint.interop.moves import Foreign, Plan
from checkpoint.interop.reference import Account, account_as_named, account_by_rules
from checkpoint.interop.rules import plan_import
from checkpoint.store.contract import Store

MODEL, OPTIMIZER, OTHER, EXTRA = "model", "optimizer", "other", "extra"
STATE, GROUPS = "state", "param_groups"
_OTHER = "other."
_DEFAULT_RUN = "run"  # as a Checkpointer calls it


@dataclass(frozen=True, slots=True)
class Adoption:
    """What a foreign checkpoint is to become: of which run and step, by which rules, cut for which layout.

    Without a step it is the foreign one's own, or 0. `ties` say which names are other names of a weight,
    `numbering` whether an optimizer that only counts its parameters is believed to count in their order.
    Raises Misuse for a step below 0, and for a run that nobody would find again.
    """

    run: str = _DEFAULT_RUN
    step: int | None = None
    rules: RuleChoice | None = None
    to: str = ONE_RANK
    ties: Ties = field(default_factory=dict)
    numbering: Numbering = Numbering.TOLD

    def __post_init__(self) -> None:
        parts = self.run.split("/")
        if {"", ".", ".."} & set(parts) or not self.run.isprintable() or self.run != self.run.strip():
            raise Misuse(
                f"{self.run!r} cannot name a run: give the name that its Checkpointer has, with no space or "
                "'/' at its ends and no '..' in it"
            )
        if self.step is not None and self.step < 0:
            raise Misuse(f"a checkpoint's step cannot be {self.step}: steps begin with 0")


@dataclass(frozen=True, slots=True)
class Sighted:
    """A foreign checkpoint's plan, with universal names; `notes` tell what is left out.

    `words` tell what the same tensors are by what is written alone, of which the plan knows nothing.
    """

    plan: Plan
    words: Callable[[], Account]
    skeleton: Any
    notes: tuple[str, ...] = ()
    ties: Ties = field(default_factory=dict)

    def account(self) -> Account:
        """Return what proofs go by. Raises Mismatch if the plan makes tensors of other types or shapes."""
        account = self.words()
        check_described(account, self.plan.tensors)
        return account


@dataclass(frozen=True, slots=True)
class _Reference:
    """Stands for a tensor in a state that is to be taken apart."""

    name: str


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
        peak_bytes=most_held_bytes(cuts_of(draft.tensors, draft.pieces), settings),
        grown_bytes=high_water_bytes() - before,
        num_resumed_bytes=written.num_resumed_bytes,
        seconds=time.monotonic() - began_s,
        proofs=tuple(proofs),
        notes=tuple(notes),
    )


def check_new(target: Store, draft: Draft) -> None:
    """See that a store has no checkpoint of the step that is to be written. Raises AlreadyExists."""
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
    if adoption.numbering is Numbering.TOLD:
        check_sure(about.doubts, origin)
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


def check_sure(doubts: Sequence[Sequence[str]], origin: str) -> None:
    """Raise Unsupported if only an order of parameters that is in no file says whose states are."""
    if doubts:
        raise Unsupported(
            f"the optimizer of {origin} numbers its parameters and does not name them. Of equal shape are "
            f"{listed(doubts[0])}: another order would swap their states, and nothing would show it. Was it "
            "made of model.parameters(), all in the model's order (within each group)? Then say --by-order "
            "(Numbering.BY_ORDER). Else save it with names: torch.optim.X(model.named_parameters())"
        )


def sight(foreign: ForeignCheckpoint, choice: RuleChoice | None, ties: Ties | None = None) -> Sighted:
    """Return the universal tensors that a foreign checkpoint holds, by rules or by their own names.

    `ties` are added to those that the checkpoint tells of.

    Raises FormatError if its tensors are spread over ranks and no rules say how.
    """
    about = foreign.about
    extra = dict(about.extra)
    said = extra.pop(TIED, None)
    known = said if isinstance(said, dict) else {}
    if choice is None:
        if any(ranks > 1 for ranks in about.axes.values()):
            raise FormatError(
                f"the tensors of this {about.format} checkpoint are spread over {dict(about.axes)}: "
                "name the rules of its model (--rules, --set)"
            )
        ties = merged({**about.ties, **known}, ties or {})
        plan = tie(_renamed(as_they_are(foreign.tensors), from_foreign), ties)
        words = partial(_account_as_named, foreign.tensors, ties)
        return Sighted(plan, words, _skeleton(plan.tensors, extra, ties), ties=ties)
    ties = merged(known, ties or {})  # what the files call tied, the rules speak of
    others = [number for number, one in enumerate(foreign.tensors) if one.name.startswith(_OTHER)]
    numbers = [number for number in range(len(foreign.tensors)) if number not in set(others)]
    sizes = {**_known_sizes(choice, about.sizes), **choice.sizes}
    if any(rule.padding for rule in choice.rules.rules):
        _check_vocabulary(sizes, about)
    plan = plan_import(choice.rules, sizes, about.axes, [foreign.tensors[number] for number in numbers])
    plan = tie(_renamed(_renumbered(plan, numbers, foreign.tensors), from_rules), ties)
    notes = [
        f"{name}={size} was given, but the files say {about.sizes[name]}; where both fit, no shape tells"
        for name, size in choice.sizes.items()
        if about.sizes.get(name, size) != size
    ]
    if others:
        notes.append(f"{len(others)} tensors that are neither weights nor optimizer states are left out")
    chosen = {number: foreign.tensors[number] for number in numbers}
    words = partial(accounted, RuleChoice(choice.rules, sizes), about.axes, chosen, ties)
    return Sighted(plan, words, _skeleton(plan.tensors, extra, ties), tuple(notes), ties)


def accounted(
    choice: RuleChoice, axes: Mapping[str, int], foreign: Mapping[int, Foreign], ties: Ties
) -> Account:
    """Tell what foreign tensors, by number, are by the words of rules, with universal names."""
    account = account_by_rules(choice.rules, choice.sizes, axes, foreign)
    return account.renamed(from_rules).tied(universal(ties))


def _account_as_named(foreign: Sequence[Foreign], ties: Ties) -> Account:
    names = {number: from_foreign(one.name) for number, one in enumerate(foreign)}
    return account_as_named(dict(enumerate(foreign)), names).tied(universal(ties))


@dataclass(frozen=True, slots=True)
class _Nested:
    """A state under construction."""

    tree: dict[str, Any] = field(default_factory=dict)

    def put(self, path: Sequence[str], value: Any) -> None:
        """Put a value in its place; what is a dict there already is added to."""
        if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
            for name, item in value.items():
                self.put((*path, name), item)
            return
        node = self.tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise FormatError(f"{'/'.join(path)} cannot lie in what is a value of its own")
        node[path[-1]] = value


def _skeleton(specs: Sequence[TensorSpec], extra: Mapping[str, Any], ties: Ties) -> Any:
    """Return the state around tensors, as a Checkpointer saves it; plain data lies beside it by name.

    An optimizer of which no groups are told gets one, of all its parameters.
    """
    nested = _Nested()
    for spec in specs:
        owner = owner_of(spec.name)
        kind, _, rest = spec.name.partition("/")
        is_flat = kind in (MODEL, OTHER)
        path = (kind, rest) if is_flat else tuple(spec.name.split("/"))
        nested.put((OPTIMIZER, STATE, owner.parameter, owner.state) if owner else path, _Reference(spec.name))
    for other, name in ties.items():
        nested.put((MODEL, other), _Reference(f"{MODEL}/{name}"))
    for name, value in extra.items():
        nested.put((name,) if name not in (MODEL, OTHER) else (EXTRA, name), value)
    optimizer = nested.tree.get(OPTIMIZER)
    if optimizer is not None:
        optimizer.setdefault(GROUPS, [{"params": list(optimizer.get(STATE, {}))}])
    flat = flatten(nested.tree, lambda value: isinstance(value, _Reference), key=lambda leaf: leaf.name)
    renamed = {path: leaf.name for path, leaf in flat.leaves.items()}
    if any(path != name for path, name in renamed.items()):
        strange = next(name for path, name in renamed.items() if path != name)
        raise FormatError(f"two tensors would be called {strange!r}: rename one by rules")
    return flat.skeleton


def _known_sizes(choice: RuleChoice, sizes: Mapping[str, int]) -> dict[str, Size]:
    return {name: size for name, size in sizes.items() if name in choice.rules.sizes}


def _check_vocabulary(sizes: Mapping[str, Size], about: About) -> None:
    """Refuse a vocabulary of which words would be taken for padding. Raises Misuse."""
    least = about.sizes.get("vocab", about.sizes.get(LEAST_VOCAB, 0))
    given = sizes.get("vocab")
    if isinstance(given, int) and given < least:
        raise Misuse(
            f"vocab={given} would leave out words as if they were padding: by what the files say of their "
            f"run there are at least {least}"
        )


def _renamed(plan: Plan, rename: Any) -> Plan:
    specs = tuple(TensorSpec(rename(one.name), one.dtype, one.shape) for one in plan.tensors)
    return Plan(plan.foreign, specs, plan.moves, plan.padding, plan.dropped)


def _renumbered(plan: Plan, numbers: Sequence[int], foreign: Sequence[Foreign]) -> Plan:
    """Return a plan of some foreign tensors as one of all."""
    moves = tuple(
        type(move)(
            numbers[move.source],
            move.source_box,
            move.order,
            move.target,
            move.target_box,
            move.how,
        )
        for move in plan.moves
    )
    padding = tuple((numbers[number], box) for number, box in plan.padding)
    return Plan(tuple(foreign), plan.tensors, moves, padding, tuple(numbers[one] for one in plan.dropped))
