"""What a foreign checkpoint is as a universal one: its tensors, by a plan and by words, and their state."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import FormatError, Incomplete, Mismatch, Misuse, Unsupported
from checkpoint.format.tree import flatten
from checkpoint.interop.account import Account, account_as_named
from checkpoint.interop.conversion.assembling import as_they_are
from checkpoint.interop.conversion.bookkeeping import without_books
from checkpoint.interop.conversion.casting import FLOATS
from checkpoint.interop.conversion.following import follow_inward
from checkpoint.interop.conversion.names import from_foreign, from_rules
from checkpoint.interop.conversion.proving import check_described
from checkpoint.interop.conversion.roles import owner_of
from checkpoint.interop.conversion.ruled import RuleChoice, misfit
from checkpoint.interop.conversion.tying import TIED, Ties, merged, tie, ties_of_weights, universal
from checkpoint.interop.expression import Size
from checkpoint.interop.formats.contract import LEAST_VOCAB, About, ForeignCheckpoint
from checkpoint.interop.formats.hf_config import retyped
from checkpoint.interop.formats.numbered import listed
from checkpoint.interop.moves import Foreign, How, Plan
from checkpoint.interop.reference import account_by_rules
from checkpoint.interop.rules import plan_import

MODEL, OPTIMIZER, OTHER, EXTRA = "model", "optimizer", "other", "extra"
STATE, GROUPS = "state", "param_groups"
_OTHER = "other."


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
    extra: Mapping[str, Any] = field(default_factory=dict)

    def account(self) -> Account:
        """Return what proofs go by. Raises Mismatch if the plan makes tensors of other types or shapes."""
        account = self.words()
        check_described(account, self.plan.tensors)
        return account


@dataclass(frozen=True, slots=True)
class _Reference:
    """Stands for a tensor in a state that is to be taken apart."""

    name: str


def check_sure(names: Collection[str], sureness: tuple[Sequence[Sequence[str]], str], origin: str) -> None:
    """See that it is known whose the states of an optimizer are, if any are among universal names.

    `sureness` is what `About` says: its doubts, and why it is untold. Raises Unsupported.
    """
    doubts, untold = sureness
    if untold and not all(name.startswith(f"{MODEL}/") for name in names):
        raise Unsupported(f"{untold}. Its weights alone are taken by --only 'model/*'")
    if doubts and any(map(owner_of, names)):
        raise Unsupported(
            f"the optimizer of {origin} numbers its parameters and does not name them. Of equal shape are "
            f"{listed(doubts[0])}: another order would swap their states, and nothing would show it. Was it "
            "made of model.parameters(), all in the model's order (within each group)? Then say --by-order "
            "(Numbering.BY_ORDER). Else save it with names, torch.optim.X(model.named_parameters()), or take "
            "the weights alone: --only 'model/*'"
        )


def sight(foreign: ForeignCheckpoint, choice: RuleChoice | None, ties: Ties | None = None) -> Sighted:
    """Return the universal tensors that a foreign checkpoint holds, by rules or by their own names.

    `ties` are added to those that the checkpoint tells of.

    Raises FormatError if its tensors are spread over ranks and no rules say how.
    """
    about = foreign.about
    extra = without_books(about.extra)
    said = extra.pop(TIED, None)
    known = said if isinstance(said, dict) else {}
    if choice is None:
        if any(ranks > 1 for ranks in about.axes.values()):
            raise FormatError(
                f"the tensors of this {about.format} checkpoint are spread over {dict(about.axes)}: "
                "name the rules of its model (--rules, --set)"
            )
        plan = _renamed(as_they_are(foreign.tensors), from_foreign)
        ties, notes = _tied({**about.ties, **known}, ties, plan)
        plan = tie(plan, ties)
        words = partial(_account_as_named, foreign.tensors, ties)
        return Sighted(plan, words, _skeleton(plan.tensors, extra, ties), tuple(notes), ties, extra)
    others = [number for number, one in enumerate(foreign.tensors) if one.name.startswith(_OTHER)]
    numbers = [number for number in range(len(foreign.tensors)) if number not in set(others)]
    sizes = {**_known_sizes(choice, about.sizes), **choice.sizes}
    if any(rule.padding for rule in choice.rules.rules):
        _check_vocabulary(sizes, about)
    try:
        plan = plan_import(choice.rules, sizes, about.axes, [foreign.tensors[number] for number in numbers])
    except (Mismatch, Incomplete) as error:
        if _is_told_otherwise(choice, about, error):
            raise misfit(error) from error
        raise
    if not plan.tensors:
        raise Misuse(
            f"the rules {choice.rules.name} leave out all {len(foreign.tensors)} tensors of this "
            f"{about.format} checkpoint: nothing is left to convert"
        )
    _check_floats(plan)
    plan = _renamed(_renumbered(plan, numbers, foreign.tensors), from_rules)
    ties, notes = _tied(known, ties, plan)  # what the files call tied, the rules speak of
    plan = tie(plan, ties)
    notes += [
        f"{name}={size} was given, but the files say {about.sizes[name]}; where both fit, no shape tells"
        for name, size in choice.sizes.items()
        if about.sizes.get(name, size) != size
    ]
    notes += _dropped(plan)
    if others:
        notes.append(f"{len(others)} tensors that are neither weights nor optimizer states are left out")
    chosen = {number: foreign.tensors[number] for number in numbers}
    words = partial(accounted, RuleChoice(choice.rules, sizes), about.axes, chosen, ties)
    extra = follow_inward(_of_new_type(extra, plan), plan)
    return Sighted(plan, words, _skeleton(plan.tensors, extra, ties), tuple(notes), ties, extra)


def _tied(known: Mapping[str, str], told: Ties | None, plan: Plan) -> tuple[dict[str, str], list[str]]:
    """Return the ties of a plan's weights, and a note of those that files know of weights they do not hold.

    What people tell stays as it is: a weight that is not there is their mistake.
    """
    there = ties_of_weights(known, {one.name for one in plan.tensors})
    lost = [str(other) for other in known if other not in there and other not in (told or {})]
    notes = [f"ties of weights that are not there are left out: {listed(lost)}"] if lost else []
    return merged(there, told or {}), notes


def _dropped(plan: Plan) -> list[str]:
    """Return a note of the tensors that rules leave out by name, each name once for all ranks."""
    names = list(dict.fromkeys(plan.foreign[number].name for number in plan.dropped))
    return [f"tensors that the rules drop: {len(names)} ({listed(names)})"] if names else []


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


def _check_floats(plan: Plan) -> None:
    """Refuse to cast or average what are no floating-point numbers of the usual types. Raises Misuse."""
    for move in plan.moves:
        one, spec = plan.foreign[move.source], plan.tensors[move.target]
        if {one.dtype, spec.dtype} <= set(FLOATS):
            continue
        if one.dtype != spec.dtype or move.how is How.MEAN:
            act = "averaged" if move.how is How.MEAN else f"cast to {spec.dtype}"
            raise Misuse(
                f"{one} is {one.dtype}, and cannot be {act} for {spec.name!r}, as the rules ask: only "
                f"{', '.join(FLOATS)} are cast, each to another of these, and averaged"
            )


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


def _of_new_type(extra: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return plain data whose configuration tells the type that rules cast all of a model's floats to."""
    weights = {
        number: one.dtype for number, one in enumerate(plan.tensors) if one.name.startswith(f"{MODEL}/")
    }
    kinds = {dtype for dtype in weights.values() if dtype in FLOATS}
    is_cast = any(
        plan.foreign[one.source].dtype != weights.get(one.target)
        for one in plan.moves
        if one.target in weights
    )
    config = extra.get("config")
    if len(kinds) != 1 or not is_cast or not isinstance(config, dict):
        return dict(extra)
    return {**extra, "config": retyped(config, *kinds)}


def _is_told_otherwise(choice: RuleChoice, about: About, error: Exception) -> bool:
    """Whether sizes that people gave may be why: files tell others, or none and shapes are off."""
    told = {
        name: about.sizes.get(name) for name, size in choice.sizes.items() if about.sizes.get(name) != size
    }
    return any(size is not None for size in told.values()) or (bool(told) and isinstance(error, Mismatch))


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
