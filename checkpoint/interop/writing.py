"""Plans an export by rules: which foreign tensors hold the given global ones, and where. Pure.

The shapes of the foreign tensors are worked out here; the moves are those of an import of what is to be
written, so that both directions are one plan, and proved the same way.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Incomplete, Mismatch
from checkpoint.interop.cutting import repeat_of
from checkpoint.interop.document import Concat, Duplicate, Held, Rule, RuleSet, State
from checkpoint.interop.expression import Size, evaluate
from checkpoint.interop.grammar import PARAMETER
from checkpoint.interop.joining import concats_on
from checkpoint.interop.moves import Foreign, Plan
from checkpoint.interop.naming import Model, local_number
from checkpoint.interop.placing import resolve_sizes
from checkpoint.interop.rules import check_shape, declared_shapes, plan_import


@dataclass(slots=True)
class _Group:
    """The global tensors that one foreign name holds: the first of each piece."""

    rule: Rule
    captures: Mapping[str, str]
    state: State | None
    state_captures: Mapping[str, str]
    pieces: dict[int, TensorSpec] = field(default_factory=dict)


def plan_export(
    rules: RuleSet, sizes: Mapping[str, Size], axes: Mapping[str, int], tensors: Sequence[TensorSpec]
) -> Plan:
    """List the foreign tensors that hold these global ones, for so many ranks of these axes, and how.

    The plan is that of their import: a writer fills source boxes from target boxes, padding with zeros.

    Raises Mismatch naming a tensor that no rule writes, or two do; Incomplete if one is missing that a
    foreign tensor needs; FormatError if the rules cannot be worked out.
    """
    model = Model(rules, resolve_sizes(rules, sizes), axes)
    groups: dict[tuple[object, ...], _Group] = {}
    declared = declared_shapes(model)
    for spec in tensors:
        check_shape(spec.name, spec.shape, declared)  # as it is, before sizes make something else of it
        _assign(model, groups, spec)
    foreign = [tensor for group in groups.values() for tensor in _write(model, group)]
    plan = plan_import(rules, sizes, axes, foreign)
    _check_same(plan, tensors)
    return plan


def _assign(model: Model, groups: dict[tuple[object, ...], _Group], spec: TensorSpec) -> None:
    """Put a global tensor into the group of the one foreign name that holds it, and of those with copies."""
    found = list(_owners(model, spec.name))
    proper = [group.rule for group, _ in found if group.rule.duplicate is Duplicate.NONE]
    if len(proper) != 1:
        which = " and ".join(str(rule) for rule in proper[:3]) or f"no rule of {model.rules.name}"
        raise Mismatch(f"{which} would write {spec.name!r}: exactly one rule may")
    for group, piece in found:
        key = (
            id(group.rule),
            tuple(sorted(group.captures.items())),
            id(group.state),
            tuple(sorted(group.state_captures.items())),
        )
        groups.setdefault(key, group).pieces.setdefault(piece, spec)


def _owners(model: Model, name: str) -> Iterator[tuple[_Group, int]]:
    for state in model.rules.states:
        found = state.to.match(name)
        if found is not None:
            parameter = found.pop(PARAMETER)
            for rule, piece, captures in _writers(model, parameter):
                yield _Group(rule, captures, state, found), piece
    for rule, piece, captures in _writers(model, name):
        yield _Group(rule, captures, None, {}), piece


def _writers(model: Model, name: str) -> Iterator[tuple[Rule, int, dict[str, str]]]:
    """Yield (rule, piece, captures) for every rule that makes a global tensor of this name."""
    for rule in model.active_rules():
        series = {one.number for one in (rule.unstack, rule.split) if one is not None and one.number}
        for number, piece in enumerate(rule.pieces):
            found = piece.to.match(name)
            if found is not None and rule.duplicate is not Duplicate.OPTIONAL:
                yield rule, number, {key: text for key, text in found.items() if key not in series}


def _write(model: Model, group: _Group) -> Iterator[Foreign]:
    """Yield the foreign tensors of a group, on every rank that has one."""
    rule = group.rule
    missing = [piece.to.text for number, piece in enumerate(rule.pieces) if number not in group.pieces]
    if missing:
        there = [spec.name for spec in group.pieces.values()]
        raise Incomplete(f"{rule} needs {missing} beside {there[:3]}, and they are not there")
    for captures in _captures(model, group):
        for ranks in product(*(_ranks(model, rule, axis) for axis in model.axes)):
            at = dict(zip(model.axes, ranks, strict=True))
            local = _local(model, rule, captures, at)
            if local is not None:
                name = rule.names.fill(local)
                if group.state is not None:
                    name = group.state.names.fill({**group.state_captures, PARAMETER: name})
                yield Foreign(name, group.pieces[0].dtype, _shape(model, group, at), at)


def _captures(model: Model, group: _Group) -> list[dict[str, str]]:
    """Return the captures of every foreign name of a group: one, or one for each tensor that is stacked."""
    rule, captures = group.rule, dict(group.captures)
    if rule.stack:
        count = evaluate(rule.stack.count, model.scope({}))
        found = [{**captures, rule.stack.number: str(number)} for number in range(count)]
    else:
        found = [captures]
    lacking = rule.names.captures - found[0].keys()
    if lacking:
        raise Mismatch(f"{rule} cannot be written: global names do not tell its captures {sorted(lacking)}")
    return found


def _ranks(model: Model, rule: Rule, axis: str) -> Sequence[int]:
    """Return the ranks of an axis that may hold a tensor of a rule; numbers in its name narrow them down."""
    ranks = model.axes[axis]
    match rule.axes.get(axis):
        case Held.FIRST | Held.ONE:
            return [0]
        case Held.LAST:
            return [ranks - 1]
        case Held.ENDS:
            return sorted({0, ranks - 1})
        case _:
            return range(ranks)


def _local(
    model: Model, rule: Rule, captures: Mapping[str, str], at: Mapping[str, int]
) -> dict[str, str] | None:
    """Return the captures as the rank at hand calls them; None if it does not have the tensor."""
    local = dict(captures)
    for name, numbering in rule.numbers.items():
        if name in local:
            number = local_number(model, numbering, int(local[name]), at) if local[name].isdecimal() else None
            if number is None:
                return None
            local[name] = str(number)
    return local


def _shape(model: Model, group: _Group, at: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a group's foreign tensor on a rank."""
    rule, specs = group.rule, group.pieces
    if group.state is not None and group.state.is_single:
        return specs[0].shape
    bodies = {piece: _body(model, rule, piece, spec, at) for piece, spec in specs.items()}
    shape = list(bodies[0])
    if rule.split:
        unit = sum(body[rule.split.dim] for body in bodies.values())
        shape[rule.split.dim] = unit * repeat_of(model, rule, at)
    if rule.unstack:
        shape.insert(rule.unstack.dim, evaluate(rule.unstack.count, model.scope(at)))
    if rule.order is not None:
        shape = [shape[rule.order.index(dim)] for dim in range(len(shape))]
    return tuple(shape)


def _body(model: Model, rule: Rule, piece: int, spec: TensorSpec, at: Mapping[str, int]) -> list[int]:
    """Return how much of each dim of a piece a rank has; along a split dim, in one of its turns."""
    whole = list(spec.shape)
    if rule.stack:
        if rule.stack.dim >= len(whole):
            raise Mismatch(
                f"{spec.name} has the shape {spec.shape}; {rule} stacks along its dim {rule.stack.dim}"
            )
        del whole[rule.stack.dim]
    if rule.padding and rule.padding.dim < len(whole):
        whole[rule.padding.dim] = evaluate(rule.padding.total, model.scope(at))
    return [_along(model, rule, (piece, dim, size), spec, at) for dim, size in enumerate(whole)]


def _along(
    model: Model, rule: Rule, what: tuple[int, int, int], spec: TensorSpec, at: Mapping[str, int]
) -> int:
    piece, dim, size = what
    is_split = rule.split is not None and rule.split.dim == dim
    if is_split and (given := rule.pieces[piece].size) is not None:
        return evaluate(given, model.scope(at))
    parts = 1
    for axis, copies in concats_on(model, rule, piece, dim):
        use = {**rule.axes, **rule.pieces[piece].axes}[axis]
        if isinstance(use, Concat) and use.size is not None and not is_split:
            return evaluate(use.size, model.scope(at))
        parts *= model.axes.get(axis, 1) // copies
    if is_split and rule.split is not None and rule.split.number is None:
        parts *= repeat_of(model, rule, at)
    if size % parts:
        raise Mismatch(
            f"dim {dim} of {spec.name} has {size} elements, which {parts} equal parts do not divide: "
            f"{rule} has to say how large they are"
        )
    return size // parts


def _check_same(plan: Plan, tensors: Sequence[TensorSpec]) -> None:
    """See that importing what is to be written gives back exactly what was asked for."""
    back = {spec.name: spec.shape for spec in plan.tensors}
    for spec in tensors:
        if back.get(spec.name) != spec.shape:
            raise Mismatch(f"{spec.name!r} of shape {spec.shape} would come back as {back.get(spec.name)}")
    extra = sorted(back.keys() - {spec.name for spec in tensors})
    if extra:
        raise Incomplete(f"what is to be written also needs {extra[:5]}, which are not there")
