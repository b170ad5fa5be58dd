"""What a checkpoint becomes in another framework's names, shards and format, worked out beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import FormatError, Incomplete, Mismatch, Misuse
from checkpoint.format.codec import checksum
from checkpoint.format.dtypes import itemsize
from checkpoint.format.scheme import parse_layout
from checkpoint.interop.account import Account, account_as_named
from checkpoint.interop.conversion.assembling import as_they_are
from checkpoint.interop.conversion.casting import (
    FLOATS,
    Cast,
    note_uncast,
    parse_dtype,
)
from checkpoint.interop.conversion.contract import (
    ConversionSettings,
)
from checkpoint.interop.conversion.following import follow_outward
from checkpoint.interop.conversion.names import from_foreign, rule_name, to_foreign
from checkpoint.interop.conversion.origins import Origin
from checkpoint.interop.conversion.outbound import Outbound, staging_bytes, working_bytes
from checkpoint.interop.conversion.resharding import ONE_RANK, Chosen, num_bytes_of
from checkpoint.interop.conversion.roles import owner_of
from checkpoint.interop.conversion.ruled import RuleChoice, knowing, misfit, uncast
from checkpoint.interop.conversion.sighting import accounted, check_sure
from checkpoint.interop.conversion.skeletons import matches, nothing_fits
from checkpoint.interop.conversion.surplus import HOLD_ROUNDED, own_tensors
from checkpoint.interop.conversion.tying import TIED, Ties, ties_of_weights, universal, with_copies
from checkpoint.interop.formats.containers import containers_of
from checkpoint.interop.formats.contract import About, Contents
from checkpoint.interop.formats.hf_config import retyped
from checkpoint.interop.formats.told import HYPER
from checkpoint.interop.moves import Foreign, Plan
from checkpoint.interop.placing import resolve_sizes
from checkpoint.interop.wholeness import check_as_named, check_by_rules
from checkpoint.interop.writing import plan_export

_AS_NAMED = (
    "no rules are given, so names and shapes stay as they are: Megatron loads only what has its own names "
    "(--rules; docs/rules.md)"
)
_OF_WHOLES = ("megatron-dist", "deepspeed", "deepspeed-universal", "dcp", "hf", "torch")
_LEFT_OUT = "the format {format} holds no optimizer: {number} of its tensors are left out"


@dataclass(frozen=True, slots=True)
class Emigration:
    """What a checkpoint is to become: in which format, over which ranks, by which rules, in which type.

    Without rules every tensor keeps its name; with them `to` says over how many tensor, pipeline and expert
    ranks they are spread.
    """

    format: str
    to: str = ONE_RANK
    rules: RuleChoice | None = None
    dtype: str | None = None
    only: str | None = None


class Holds(Protocol):
    """Tells whether a format has a place for an optimizer."""

    def __call__(self, format: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Outward:
    """An export worked out: what is read, what is written, and what is left out."""

    source: Origin
    chosen: Chosen
    contents: Cast
    plan: Plan
    outbound: Outbound
    emigration: Emigration
    ties: Ties
    notes: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return {spec.name for spec in self.chosen.tensors}

    @property
    def uncast(self) -> set[str]:
        """The names of the tensors that keep their values."""
        pairs = zip(self.chosen.tensors, self.contents.tensors, strict=True)
        return {new.name for old, new in pairs if old.dtype == new.dtype}

    @property
    def written_bytes(self) -> int:
        """How many bytes the tensors to write have."""
        specs = (TensorSpec(one.name, one.dtype, one.shape) for one in self.plan.foreign)
        return sum(map(num_bytes_of, specs))

    def own(self, back: Contents) -> dict[int, Foreign]:
        """Return what was written, by number, without what the format's reader adds. Raises Mismatch."""
        return own_tensors(self.outbound, back, self.emigration.format)

    def account(self, foreign: Mapping[int, Foreign]) -> Account:
        """Tell what foreign tensors, by number, are by the words of the rules, or by their names."""
        rules = self.emigration.rules
        if rules is not None:
            return accounted(uncast(rules), _axes(self.emigration), foreign, self.ties)
        known = {to_foreign(spec.name): spec.name for spec in self.contents.tensors}
        names = {number: known.get(one.name, from_foreign(one.name)) for number, one in foreign.items()}
        return account_as_named(foreign, names).tied(universal(self.ties))

    def check_whole(self, foreign: Mapping[int, Foreign]) -> None:
        """See that all of the export is there, on each rank, in full, and nothing else. Raises Mismatch."""
        specs, rules = self.contents.tensors, self.emigration.rules
        if rules is not None:
            named = [replace(spec, name=rule_name(spec.name)) for spec in specs]
            check_by_rules(rules.rules, rules.sizes, _axes(self.emigration), foreign, named)
            return
        there = {spec.name for spec in specs}
        copies = [other for other, name in universal(self.ties).items() if name in there]
        check_as_named(foreign.values(), [to_foreign(name) for name in (*there, *copies)])

    def most_held_bytes(self, settings: ConversionSettings) -> int:
        """Return the most that buffers hold: of each thread a block and what it is made of."""
        whole = max(self.written_bytes, sum(map(num_bytes_of, self.chosen.tensors)))
        if self.outbound.turned:
            return min(settings.budget_bytes, working_bytes(settings) + staging_bytes(settings), 3 * whole)
        return min(working_bytes(settings), 2 * whole)

    @property
    def attempt(self) -> str:
        """What identifies the export: the same one is resumed."""
        told = [str(self.plan), repr(self.outbound.about), self.source.digest]
        return checksum("\n".join(told).encode()).hex()


def plan_emigration(source: Origin, emigration: Emigration, holds_optimizer: Holds) -> Outward:
    """Work out an export, before anything is read. Raises Mismatch, Incomplete, FormatError, Misuse."""
    _check_layout(emigration)
    if emigration.rules is not None:
        emigration = replace(emigration, rules=knowing(emigration.rules, source.sizes))
    keeps, notes = matches(emigration.only), list(source.notes)
    names = [spec.name for spec in source.contents.tensors if keeps(spec.name)]
    if not names:
        raise nothing_fits(emigration.only, source.step, source.url)
    if not holds_optimizer(emigration.format):
        weights = [name for name in names if name.startswith("model/")]
        if len(weights) < len(names):
            note = _LEFT_OUT.format(format=emigration.format, number=len(names) - len(weights))
            notes.append(note)
        names = weights
    if emigration.rules is not None:
        known = [name for name in names if name.startswith("model/") or owner_of(name)]
        if len(known) < len(names):
            notes.append(f"{len(names) - len(known)} tensors that the rules do not speak of are left out")
        names = known
    if emigration.rules is None and emigration.format == "megatron":
        notes.append(_AS_NAMED)
    check_sure(names, (source.doubts, source.untold), source.url)
    if not names:
        kind = FormatError if emigration.only is None else Misuse
        what = "nothing of it" if emigration.only is None else f"nothing that {emigration.only!r} fits"
        raise kind(f"{source.url}: {emigration.format} has a place for {what}; another --format may have")
    source = replace(source, ties=ties_of_weights(source.ties, set(names)))
    chosen = Chosen(source.contents, names)
    contents = Cast(chosen, _casts(chosen.tensors, emigration.dtype))
    if emigration.format in HOLD_ROUNDED:
        _check_rounded(chosen.tensors, contents.tensors, emigration)
    try:
        plan = _plan(contents.tensors, emigration)
    except (Mismatch, Incomplete, FormatError) as error:
        raise misfit(error) from error
    ties = _copied(source.ties, emigration, holds_optimizer)
    plan = with_copies(plan, contents.tensors, ties)
    widths = [itemsize(one.dtype) for one in chosen.tensors]
    outbound = Outbound(contents, plan, _about(source, emigration, plan), widths=widths)
    return Outward(
        source,
        chosen,
        contents,
        plan,
        outbound,
        emigration,
        ties,
        (*notes, *note_uncast(chosen.tensors, emigration.dtype)),
    )


def _check_layout(emigration: Emigration) -> None:
    """Refuse a layout of which the format, or an export without rules, would keep nothing."""
    scheme = parse_layout(emigration.to)
    asked = {axis for axis, ranks in scheme.mesh.axes if ranks > 1}
    asked |= {"zero"} if scheme.zero else set()
    asked |= {"align"} if scheme.align > 1 else set()
    can = (
        {"tensor", "pipeline", "expert"}
        if emigration.rules and emigration.format not in _OF_WHOLES
        else set()
    )
    if emigration.format == "deepspeed" and scheme.zero:
        can |= {"replica", "shard", "zero"}
    if asked - can:
        raise Misuse(
            f"an export to {emigration.format} cannot be divided by {', '.join(sorted(asked - can))}, as "
            f"{emigration.to!r} asks: tensor, pipeline and expert are for megatron, by rules (--rules) that "
            "know them, and replica or shard for deepspeed, beside zero=1, 2 or 3"
        )


def _check_rounded(old: Sequence[TensorSpec], new: Sequence[TensorSpec], emigration: Emigration) -> None:
    """Refuse casts after which weights would not be their masters, rounded once."""
    masters = {owned.parameter for one in old if (owned := owner_of(one.name)) and owned.state == "master"}
    for one, other in zip(old, new, strict=True):
        is_cast = one.dtype not in (other.dtype, "float32")
        if is_cast and one.name.removeprefix("model/") in masters:
            raise Misuse(
                f"{one.name} cannot become {other.dtype} beside its fp32 master, which rounds to "
                f"{one.dtype}, as readers of {emigration.format} see: export without a dtype, or only "
                "'model/*'"
            )


def _copied(ties: Ties, emigration: Emigration, holds_optimizer: Holds) -> Ties:
    """Return the ties whose weights are written by their other names as well."""
    holds_copies = holds_optimizer(emigration.format) and emigration.rules is None and emigration.only is None
    return ties if holds_copies else {}


def _casts(specs: Sequence[TensorSpec], dtype: str | None) -> dict[str, str]:
    if dtype is None:
        return {}
    kind = parse_dtype(dtype)
    return {one.name: kind for one in specs if one.name.startswith("model/") and one.dtype in FLOATS}


def _plan(specs: Sequence[TensorSpec], emigration: Emigration) -> Plan:
    """Return the plan of an export, with foreign names; its global tensors are `specs`, in their order."""
    if emigration.rules is None:
        plan = as_they_are([Foreign(to_foreign(one.name), one.dtype, one.shape) for one in specs])
        return replace(plan, tensors=tuple(specs))
    named = {rule_name(spec.name): number for number, spec in enumerate(specs)}
    axes, choice = _axes(emigration), emigration.rules
    renamed = [TensorSpec(rule_name(one.name), one.dtype, one.shape) for one in specs]
    plan = plan_export(choice.rules, choice.sizes, axes, renamed)
    moves = tuple(replace(move, target=named[plan.tensors[move.target].name]) for move in plan.moves)
    return replace(plan, tensors=tuple(specs), moves=moves)


def _axes(emigration: Emigration) -> dict[str, int]:
    """Return the axes that tensors are spread over, and their ranks."""
    return {axis: ranks for axis, ranks in parse_layout(emigration.to).mesh.axes if ranks > 1}


def _is_model_alone(extra: Mapping[str, Any]) -> bool:
    """Whether a state was a model's own, which a program loads as a whole: nothing can lie beside it."""
    places = containers_of(extra)
    return places is not None and not places.model and "optimizer" not in extra


def _about(origin: Origin, emigration: Emigration, plan: Plan) -> About:
    axes = {axis: 1 + max(one.at[axis] for one in plan.foreign) for axis in plan.foreign[0].at}
    beside = {"step": origin.step, **({TIED: dict(origin.ties)} if origin.ties else {})}
    taken = {one.name for one in plan.tensors}  # a state may have a tensor of that name
    beside = {key: item for key, item in beside.items() if f"other/{key}" not in taken}
    told = {**({} if _is_model_alone(origin.extra) else beside), **origin.extra}
    if emigration.dtype is not None and isinstance(told.get("config"), dict):
        told["config"] = retyped(told["config"], parse_dtype(emigration.dtype))
    has_states = any(owner_of(one.name) for one in plan.tensors)
    if emigration.only is not None and not has_states:  # people chose to go without
        told = {key: value for key, value in told.items() if key not in ("optimizer", HYPER)}
    if emigration.rules is not None and has_states:
        told = follow_outward(told, plan)
    scheme = parse_layout(emigration.to)
    if scheme.zero and emigration.format == "deepspeed":  # it names the ranks that its files are for
        told |= {"zero_stage": scheme.zero, "dp_world_size": scheme.mesh.size}
    chosen = resolve_sizes(emigration.rules.rules, emigration.rules.sizes) if emigration.rules else {}
    sizes = {**origin.sizes, **{name: size for name, size in chosen.items() if isinstance(size, int)}}
    return About(emigration.format, axes, origin.step, told, sizes)
