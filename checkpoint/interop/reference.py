"""What rules say of each element of foreign tensors, in plain words: the account that proofs go by. Pure.

It is worked out beside the plan that conversions follow (rules, cutting, joining), of which it knows nothing.
Both read the same document, by the same templates and expressions; how an element comes to its place is told
here a second time, dim by dim: all that there is of a dim, in the order of ranks, turns and pieces.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.account import Account, Padded, Share, whole_share
from checkpoint.interop.document import Duplicate, RuleSet
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.moves import Foreign
from checkpoint.interop.placing import resolve_sizes
from checkpoint.interop.readings import Reading, Strip, readings_of


def account_by_rules(
    rules: RuleSet, sizes: Mapping[str, Size], axes: Mapping[str, int], foreign: Mapping[int, Foreign]
) -> Account:
    """Tell what foreign tensors, by number, are by rules. Raises Mismatch where two rules disagree."""
    known = resolve_sizes(rules, sizes)
    spoken_of = [one for one in readings_of(rules, known, axes, foreign).values() if one is not None]
    tensors: dict[str, TensorSpec] = {}
    shares: list[Share] = []
    padding: list[Padded] = []
    for spec, mine, beyond in (*_numbers(spoken_of), *_wholes(spoken_of, Scope(known, axes, {}))):
        if tensors.setdefault(spec.name, spec) != spec:
            raise Mismatch(f"{spec.name!r} is {tensors[spec.name]} by one rule, and {spec} by another")
        shares += mine
        padding += beyond
    return Account(tensors, tuple(shares), tuple(padding))


_Told = tuple[TensorSpec, list[Share], list[Padded]]


def _numbers(readings: Iterable[Reading]) -> Iterator[_Told]:
    """Tell of states that are one number for all of a parameter, and so for each tensor that is in it."""
    for one in readings:
        if one.is_single:
            for name in one.names():
                spec = TensorSpec(name, one.dtype, one.tensor.shape)
                yield spec, [whole_share(one.number, one.tensor, name)], []


def _wholes(readings: Iterable[Reading], scope: Scope) -> Iterator[_Told]:
    """Tell of global tensors that are laid out of what ranks have of them."""
    groups: dict[tuple[object, ...], list[Strip]] = {}
    for one in readings:
        for strip in one.strips() if not one.is_single else ():
            groups.setdefault((strip.name, id(one.rule), one.captures), []).append(strip)
    for strips in groups.values():
        yield _laid_out(strips, scope)


def _laid_out(strips: Sequence[Strip], scope: Scope) -> _Told:
    """Lay the strips of a global tensor end to end along each of its dims."""
    rule, one = strips[0].reading.rule, strips[0]
    starts, lengths = [], []
    for line in range(len(one.lines)):
        sizes = {strip.lines[line][1]: strip.box.size[strip.lines[line][0]] for strip in strips}
        ends = list(accumulate(sizes[key] for key in sorted(sizes)))
        starts.append(dict(zip(sorted(sizes), [0, *ends], strict=False)))
        lengths.append(ends[-1])
    shares, padding = [], []
    for strip in strips:
        begin = [starts[line][key] for line, (_, key) in enumerate(strip.lines)]
        real, beyond = _parted(strip, begin, scope)
        padding += beyond
        if not real.is_empty:
            shares.append(_share(strip, real, begin))
    if rule.padding:
        lengths[rule.padding.dim] = evaluate(rule.padding.real, scope)
    if rule.stack:
        lengths.insert(rule.stack.dim, evaluate(rule.stack.count, scope))
    return TensorSpec(one.name, one.reading.dtype, tuple(lengths)), shares, padding


def _parted(strip: Strip, begin: Sequence[int], scope: Scope) -> tuple[Box, list[Padded]]:
    """Return what of a strip is the tensor's, and what is beyond its end."""
    padding, box = strip.reading.rule.padding, strip.box
    if padding is None:
        return box, []
    dim, size = strip.lines[padding.dim][0], box.size[strip.lines[padding.dim][0]]
    keep = min(size, max(0, evaluate(padding.real, scope) - begin[padding.dim]))
    if keep == size:
        return box, []
    rest = Box(
        tuple(at + keep * (each == dim) for each, at in enumerate(box.start)),
        tuple(size - keep if each == dim else n for each, n in enumerate(box.size)),
    )
    real = Box(box.start, tuple(keep if each == dim else n for each, n in enumerate(box.size)))
    return real, [Padded(strip.reading.number, rest, strip.name, begin[padding.dim] + keep, size - keep)]


def _share(strip: Strip, box: Box, begin: list[int]) -> Share:
    rule, dims = strip.reading.rule, [dim for dim, _ in strip.lines]
    start, along = list(begin), {dim: line for line, dim in enumerate(dims)}
    if rule.stack:
        number = int(dict(strip.reading.captures)[rule.stack.number])
        start.insert(rule.stack.dim, number)
        along = {dim: line + (line >= rule.stack.dim) for dim, line in along.items()}
    copy = "" if rule.duplicate is Duplicate.NONE else str(rule)
    where = tuple(along.get(dim) for dim in range(len(box.size)))
    return Share(strip.reading.number, box, strip.name, tuple(start), where, copy, strip.is_mean)
