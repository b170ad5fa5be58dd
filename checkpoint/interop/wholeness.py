"""Whether files have all that rules say of them: each tensor, on each rank that holds it, to its ends. Pure.

A reader takes shapes and ranks as it finds them; here they are held against what they have to be. Like the
account that proofs go by, this reads the rules' words, and knows nothing of the plan that was followed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.document import Concat, Duplicate, Held, Rule, RuleSet, State
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.grammar import PARAMETER
from checkpoint.interop.moves import Foreign
from checkpoint.interop.placing import resolve_sizes
from checkpoint.interop.readings import Key, Reading, Strip, active_rules, readings_of


def check_as_named(foreign: Iterable[Foreign], names: Sequence[str]) -> None:
    """See that tensors have these names, each of them once, and no other. Raises Mismatch."""
    found, wanted = Counter(one.name for one in foreign), Counter(names)
    if found != wanted:
        raise Mismatch(
            f"it lacks {sorted(wanted - found)[:5]}; {sorted(found - wanted)[:5]} should not be there"
        )


def check_by_rules(
    rules: RuleSet,
    sizes: Mapping[str, Size],
    axes: Mapping[str, int],
    foreign: Mapping[int, Foreign],
    specs: Iterable[TensorSpec],
) -> None:
    """See that foreign tensors are what rules make of global ones, by their names, and nothing beside.

    Raises Mismatch naming what is strange, what a rank lacks, or what is of another size than the rules say.
    """
    scope, known = Scope(resolve_sizes(rules, sizes), axes, {}), {spec.name: spec for spec in specs}
    holders: dict[tuple[object, ...], list[Reading]] = {}
    for number, one in readings_of(rules, scope.sizes, axes, foreign).items():
        if one is None or not one.names() <= known.keys():
            raise Mismatch(
                f"it has {foreign[number]}, which {rules.name} does not make of the source's tensors"
            )
        key = (id(one.rule), one.captures, id(one.state), one.state_captures)
        holders.setdefault(key, []).append(one)
    for some in holders.values():
        _check_ranks(some, scope)
        _check_extents(some, known, scope)
    _check_names(rules, scope, [some[0] for some in holders.values()], list(known))


def _check_names(rules: RuleSet, scope: Scope, read: Sequence[Reading], names: Sequence[str]) -> None:
    """See that every rule that is to be written has whatever it fills, second copies among it."""
    found: dict[tuple[int, int], set[str]] = {}
    for one in read:
        found.setdefault((id(one.rule), id(one.state)), set()).update(one.names())
    for state, rule in product((*rules.states, None), active_rules(rules, scope)):
        if rule.duplicate is not Duplicate.OPTIONAL:
            there = found.get((id(rule), id(state)), set())
            lacking = [name for name in names if name not in there and _fills(state, rule, name)]
            if lacking:
                raise Mismatch(f"it lacks what {rule} writes of {lacking[:5]}")


def _fills(state: State | None, rule: Rule, name: str) -> bool:
    told = state.to.match(name) if state else {PARAMETER: name}
    return told is not None and any(piece.to.match(told[PARAMETER]) is not None for piece in rule.pieces)


# -------------------------------------------------------------------------------- one name, on all its ranks


def _check_ranks(some: Sequence[Reading], scope: Scope) -> None:
    """See that a name is on exactly the ranks that its rule gives it to; where it says `one`, on any one."""
    one, held = some[0], [axis for axis in scope.axes if some[0].rule.axes.get(axis) is not Held.ONE]
    wanted = {tuple(at[axis] for axis in held) for at in _places(one, scope)}
    found = Counter(tuple(other.tensor.at.get(axis, 0) for axis in held) for other in some)
    if found != Counter(wanted):
        where = sorted(
            (wanted - found.keys()) | {at for at, number in found.items() if number > 1 or at not in wanted}
        )
        raise Mismatch(f"{one.tensor.name} is missing, or too many, on the ranks {where[:5]} of {held}")
    if len({other.tensor.dtype for other in some}) > 1:
        raise Mismatch(f"{one.tensor.name} has not one dtype on all ranks")


def _places(one: Reading, scope: Scope) -> Iterator[dict[str, int]]:
    """Yield the places whose ranks have a name; numbers in it may be of some ranks only."""
    captures = dict(one.captures)
    numbers = [(rule, int(captures[name])) for name, rule in one.rule.numbers.items() if name in captures]
    for ranks in product(*(_ranks(one.rule, axis, scope) for axis in scope.axes)):
        at = dict(zip(scope.axes, ranks, strict=True))
        here = Scope(scope.sizes, scope.axes, at)
        counts = [
            (number - evaluate(rule.first, here), evaluate(rule.count, here)) for rule, number in numbers
        ]
        if all(0 <= number < count for number, count in counts):
            yield at


def _ranks(rule: Rule, axis: str, scope: Scope) -> Iterable[int]:
    last = scope.ranks(axis) - 1
    match rule.axes.get(axis):
        case Held.FIRST:
            return (0,)
        case Held.LAST:
            return (last,)
        case Held.ENDS:
            return sorted({0, last})
        case _:
            return range(last + 1)


def _check_extents(some: Sequence[Reading], known: Mapping[str, TensorSpec], scope: Scope) -> None:
    """See that a name has everywhere the dims that its global tensors ask for, each as long as rules say."""
    strips: dict[str, list[Strip]] = {}
    for one in some:
        if one.is_single:
            continue
        dims = {
            len(known[name].shape) - bool(one.rule.stack) + bool(one.rule.unstack) for name in one.names()
        }
        if dims != {len(one.tensor.shape)}:
            raise Mismatch(f"{one.tensor} has the shape {one.tensor.shape}, and should have {dims} dims")
        mine = list(one.strips())
        if sum(strip.box.numel for strip in mine) != Box.whole(one.tensor.shape).numel:
            raise Mismatch(
                f"{one.tensor} of shape {one.tensor.shape} is longer than the pieces of {one.rule}"
            )
        for strip in mine:
            strips.setdefault(strip.name, []).append(strip)
    for group in strips.values():
        for line in range(len(group[0].lines)):
            _check_line(group, line, scope)


def _check_line(strips: Sequence[Strip], line: int, scope: Scope) -> None:
    """See that the parts of a dim are as long as rules say, or all equal, and together as long as padded."""
    rule, lengths = strips[0].reading.rule, dict[Key, int]()
    equal = dict[int, int]()
    for strip in strips:
        dim, key = strip.lines[line]
        size = strip.box.size[dim]
        wanted = _told_size(strip, line, key[-1])
        if size != equal.setdefault(key[-1], size) if wanted is None else size != wanted:
            raise Mismatch(
                f"{strip.reading.tensor} has {size} of dim {line} of {strip.name!r}: {rule} says otherwise"
            )
        lengths[key] = size
    padding = rule.padding
    if padding and padding.dim == line and sum(lengths.values()) != evaluate(padding.total, scope):
        raise Mismatch(f"{strips[0].name!r} is padded to {sum(lengths.values())}: {rule} says otherwise")


def _told_size(strip: Strip, line: int, piece: int) -> int | None:
    """Return how long a rule says that a part of a dim is; None if it is as long as the other ranks'."""
    rule, scope = strip.reading.rule, strip.reading.scope
    if rule.split and rule.split.dim == line:
        given = rule.pieces[piece].size
        return evaluate(given, scope) if given else None
    for use in strip.reading.uses(piece).values():
        if isinstance(use, Concat) and use.dim == line and use.size is not None:
            return evaluate(use.size, scope)
    return None
