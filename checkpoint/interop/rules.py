"""Plans an import by rules: which boxes of foreign tensors fill which global ones, exactly once. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod

from checkpoint.engine.plan import TensorSpec, check_cover
from checkpoint.errors import Incomplete, Mismatch, Misuse
from checkpoint.format.box import Box
from checkpoint.interop.cutting import cut
from checkpoint.interop.document import Declared, Duplicate, Rule, RuleSet, State
from checkpoint.interop.expression import Size, evaluate
from checkpoint.interop.grammar import PARAMETER
from checkpoint.interop.joining import Joined, Landing, join, join_single
from checkpoint.interop.moves import Foreign, How, Move, Plan
from checkpoint.interop.naming import Case, Model, case_of
from checkpoint.interop.placing import resolve_sizes

_MAX_DECLARED = 1 << 22


def plan_import(
    rules: RuleSet, sizes: Mapping[str, Size], axes: Mapping[str, int], foreign: Sequence[Foreign]
) -> Plan:
    """Map the tensors of a foreign checkpoint, held by so many ranks of these axes, to global tensors.

    Raises Mismatch naming a tensor that no rule matches, that two do, or that is not of the shape the rules
    speak of; Incomplete naming a global tensor of which something is missing; FormatError if the rules cannot
    be worked out.
    """
    model = Model(rules, resolve_sizes(rules, sizes), axes)
    _check_foreign(axes, foreign)
    active = model.active_rules()
    groups: dict[tuple[object, ...], tuple[Case, list[int]]] = {}
    dropped = []
    for source, tensor in enumerate(foreign):
        case = case_of(model, active, tensor.name, tensor.at)
        if case.rule.is_dropped:
            dropped.append(source)
            continue
        key = (id(case.rule), case.captures, id(case.state), case.state_captures)
        groups.setdefault(key, (case, []))[1].append(source)
    atlas = _Atlas(foreign)
    for case, sources in groups.values():
        if case.state is not None and case.state.is_single:
            joined = join_single(model, case, foreign, sources)
        else:
            leaves = [leaf for source in sources for leaf in cut(model, case, source, foreign[source])]
            joined = join(model, case, foreign, leaves)
        atlas.add(case, joined)
    plan = atlas.plan(tuple(dropped))
    _check_copies(active, plan, groups.values())
    _check_declared(model, plan)
    return plan


class _Atlas:
    """Collects where everything lands, tensor by tensor."""

    def __init__(self, foreign: Sequence[Foreign]) -> None:
        self._foreign = foreign
        self._numbers: dict[str, int] = {}
        self._specs: list[TensorSpec] = []
        self._moves: list[Move] = []
        self._padding: list[tuple[int, Box]] = []
        self._filled: dict[tuple[int, Box], tuple[Case, int]] = {}

    def add(self, case: Case, joined: Joined) -> None:
        """Add what one case comes to. Raises Mismatch if it contradicts another, or doubles it."""
        self._padding += joined.padding
        for landing in joined.landings:
            number = self._number(case, landing)
            order = case.rule.order or tuple(range(len(landing.source_box.size)))
            if case.state is not None and case.state.is_single:
                order = tuple(range(len(landing.shape)))
            if landing.box.is_empty:
                continue
            how = self._how(case, landing, number)
            self._moves.append(Move(landing.source, landing.source_box, order, number, landing.box, how))

    def plan(self, dropped: tuple[int, ...]) -> Plan:
        """Return the plan. Raises Incomplete naming a tensor that is not covered exactly once."""
        boxes: list[list[Box]] = [[] for _ in self._specs]
        for (number, box), _ in self._filled.items():
            boxes[number].append(box)
        for spec, filled in zip(self._specs, boxes, strict=True):
            check_cover(spec.name, spec.shape, filled)
        return Plan(
            tuple(self._foreign), tuple(self._specs), tuple(self._moves), tuple(self._padding), dropped
        )

    def _number(self, case: Case, landing: Landing) -> int:
        source = self._foreign[landing.source]
        spec = TensorSpec(landing.name, case.dtype or source.dtype, landing.shape)
        number = self._numbers.setdefault(landing.name, len(self._specs))
        if number == len(self._specs):
            self._specs.append(spec)
        elif self._specs[number] != spec:
            known = self._specs[number]
            raise Mismatch(
                f"{source} makes {landing.name!r} {spec.dtype} of shape {spec.shape}; the others make "
                f"it {known.dtype} of shape {known.shape}"
            )
        return number

    def _how(self, case: Case, landing: Landing, number: int) -> How:
        """Return what the move does, seeing that no two cases fill one box."""
        if case.rule.duplicate is not Duplicate.NONE or landing.how is How.SAME:
            return How.SAME
        known, source = self._filled.setdefault((number, landing.box), (case, landing.source))
        if known is not case or (landing.how is How.FILL and source != landing.source):
            if case.state is not None and case.state.is_single:
                return How.SAME
            raise Mismatch(
                f"{landing.name!r} is filled twice: from {self._foreign[source]} by {known.rule}, and from "
                f"{self._foreign[landing.source]} by {case.rule}"
            )
        return landing.how


def _check_foreign(axes: Mapping[str, int], foreign: Sequence[Foreign]) -> None:
    seen = set()
    for tensor in foreign:
        if tensor.at.keys() != axes.keys() or not all(0 <= tensor.at[axis] < axes[axis] for axis in axes):
            raise Mismatch(f"{tensor} does not say where on the axes {dict(axes)} it was")
        key = (tensor.name, *(tensor.at[axis] for axis in axes))
        if key in seen:
            raise Mismatch(f"{tensor} is there twice: is a rank's file a copy of another's?")
        seen.add(key)


# ------------------------------------------------------------------------------------- what has to be there


def _check_copies(rules: Sequence[Rule], plan: Plan, groups: Iterable[tuple[Case, list[int]]]) -> None:
    """See that every copy that has to be there is."""
    owner = {source: case.rule for case, sources in groups for source in sources}
    for rule in rules:
        if rule.duplicate is Duplicate.REQUIRED:
            copied = {move.target for move in plan.moves if owner[move.source] is rule}
            for number, spec in enumerate(plan.tensors):
                is_meant = any(piece.to.match(spec.name) is not None for piece in rule.pieces)
                if is_meant and number not in copied:
                    raise Incomplete(f"{spec.name!r} should be there a second time, by {rule}, and is not")


def _check_declared(model: Model, plan: Plan) -> None:
    """See that the weights are those that are declared, and that a state is there for all or for none."""
    states: dict[tuple[int, tuple[tuple[str, str], ...]], set[str]] = {}
    weights: dict[str, tuple[int, ...]] = {}
    for spec in plan.tensors:
        owner = _owner(model.rules.states, spec.name)
        if owner is None:
            weights[spec.name] = spec.shape
        else:
            states.setdefault(owner[0], set()).add(owner[1])
    declared = declared_shapes(model)
    if declared and (weights or not states):
        _compare(model, declared, weights)
    parameters = set(weights) or set(declared)
    for (number, captures), names in states.items():
        state = model.rules.states[number]
        missing = sorted(parameters - names)
        if missing and not state.is_optional:
            what = state.to.fill({**dict(captures), PARAMETER: "*"})
            raise Incomplete(
                f"the optimizer state {what!r} is there for {len(names)} parameters and missing for "
                f"{len(missing)}: {missing[:5]}"
            )


def _compare(
    model: Model, declared: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in declared if name not in found]
    if missing:
        raise Incomplete(
            f"{len(missing)} of the {len(declared)} tensors of {model.rules.name} are not in the checkpoint: "
            f"{missing[:5]}"
        )
    for name, shape in found.items():
        if name not in declared:
            raise Mismatch(f"{model.rules.name} has no tensor {name!r} with these sizes: {dict(model.sizes)}")
        check_shape(name, shape, declared)


def check_shape(name: str, shape: tuple[int, ...], declared: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Mismatch if a tensor is declared, and has another shape."""
    if shape != declared.get(name, shape):
        raise Mismatch(f"{name!r} has the shape {shape}; by the sizes given it should be {declared[name]}")


def declared_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of every declared tensor, by its name."""
    scope = model.scope({})
    found: dict[str, tuple[int, ...]] = {}
    for tensor in model.rules.tensors:
        if tensor.when is None or evaluate(tensor.when, scope):
            shape = tuple(evaluate(dim, scope) for dim in tensor.shape)
            found |= {tensor.names.fill(numbers): shape for numbers in _numbers(model, tensor)}
    return found


def _numbers(model: Model, tensor: Declared) -> list[dict[str, int]]:
    counts = {name: max(0, evaluate(count, model.scope({}))) for name, count in tensor.each.items()}
    if (number := prod(counts.values())) > _MAX_DECLARED:
        raise Misuse(f"by its sizes, {dict(model.sizes)}, a model of {model.rules.name} has {number} tensors")
    return [dict(zip(counts, each, strict=True)) for each in product(*map(range, counts.values()))]


def _owner(states: Sequence[State], name: str) -> tuple[tuple[int, tuple[tuple[str, str], ...]], str] | None:
    """Return which state a global name is of, and of which parameter; None if it is a weight."""
    for number, state in enumerate(states):
        found = state.to.match(name)
        if found is not None:
            parameter = found.pop(PARAMETER)
            return (number, tuple(sorted(found.items()))), parameter
    return None
