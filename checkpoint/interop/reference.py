"""What rules say of each element of foreign tensors, in plain words: the account that proofs go by. Pure.

It is worked out beside the plan that conversions follow (rules, cutting, joining), of which it knows nothing.
Both read the same document, by the same templates and expressions; how an element comes to its place is told
here a second time, dim by dim: all that there is of a dim, in the order of ranks, turns and pieces.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.account import Account, Padded, Share, whole_share
from checkpoint.interop.document import Concat, Duplicate, Held, Rule, RuleSet, State, Use
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.grammar import PARAMETER
from checkpoint.interop.moves import Foreign
from checkpoint.interop.placing import resolve_sizes

_Key = tuple[tuple[int, ...], int, int]  # what comes first along a dim: by ranks, turn, piece


def account_by_rules(
    rules: RuleSet, sizes: Mapping[str, Size], axes: Mapping[str, int], foreign: Mapping[int, Foreign]
) -> Account:
    """Tell what foreign tensors, by number, are by rules. Raises Mismatch where two rules disagree."""
    known = resolve_sizes(rules, sizes)
    anywhere = Scope(known, axes, {})
    active = [one for one in rules.rules if one.when is None or evaluate(one.when, anywhere)]
    read = [
        _read((rules.states, active), Scope(known, axes, one.at), number, one)
        for number, one in foreign.items()
    ]
    spoken_of = [one for one in read if one is not None and not one.rule.is_dropped]
    tensors: dict[str, TensorSpec] = {}
    shares: list[Share] = []
    padding: list[Padded] = []
    for spec, mine, beyond in (*_numbers(spoken_of), *_wholes(spoken_of, anywhere)):
        if tensors.setdefault(spec.name, spec) != spec:
            raise Mismatch(f"{spec.name!r} is {tensors[spec.name]} by one rule, and {spec} by another")
        shares += mine
        padding += beyond
    return Account(tensors, tuple(shares), tuple(padding))


_Told = tuple[TensorSpec, list[Share], list[Padded]]


def _numbers(readings: Iterable["_Reading"]) -> Iterator[_Told]:
    """Tell of states that are one number for all of a parameter, and so for each tensor that is in it."""
    for one in readings:
        if one.is_single:
            for name in one.names():
                spec = TensorSpec(name, one.dtype, one.tensor.shape)
                yield spec, [whole_share(one.number, one.tensor, name)], []


def _wholes(readings: Iterable["_Reading"], scope: Scope) -> Iterator[_Told]:
    """Tell of global tensors that are laid out of what ranks have of them."""
    groups: dict[tuple[object, ...], list[_Strip]] = {}
    for one in readings:
        for strip in one.strips() if not one.is_single else ():
            groups.setdefault((strip.name, id(one.rule), one.captures), []).append(strip)
    for strips in groups.values():
        yield _laid_out(strips, scope)


# ------------------------------------------------------------------------------------- one foreign tensor


@dataclass(frozen=True, slots=True)
class _Strip:
    """A box of a foreign tensor, for one global tensor; `lines` lists its dims there.

    Each line is the foreign dim that runs along it, and what orders the strips along it.
    """

    reading: "_Reading"
    name: str
    box: Box
    lines: tuple[tuple[int, _Key], ...]
    is_mean: bool


@dataclass(frozen=True, slots=True)
class _Reading:
    """A foreign tensor, and the rule that speaks of it."""

    number: int
    tensor: Foreign
    scope: Scope
    rule: Rule
    captures: tuple[tuple[str, str], ...]  # with the numbers that they have in all
    state: State | None
    state_captures: tuple[tuple[str, str], ...]

    @property
    def dtype(self) -> str:
        wanted = self.state.dtype if self.state else self.rule.dtype
        return wanted or self.tensor.dtype

    @property
    def is_single(self) -> bool:
        return self.state is not None and self.state.is_single

    def called(self, piece: int, series: Mapping[str, int]) -> str:
        """Return the global name of a piece; `series` numbers it."""
        name = self.rule.pieces[piece].to.fill({**dict(self.captures), **series})
        return self.state.to.fill({**dict(self.state_captures), PARAMETER: name}) if self.state else name

    def names(self) -> set[str]:
        """Return the names of all pieces."""
        rule, found = self.rule, set()
        turns = evaluate(rule.split.repeat, self.scope) if rule.split and rule.split.number else 1
        layers = evaluate(rule.unstack.count, self.scope) if rule.unstack else 1
        for layer, turn, piece in product(range(layers), range(turns), range(len(rule.pieces))):
            found.add(self.called(piece, self._series(layer, turn)))
        return found

    def strips(self) -> Iterator[_Strip]:
        """Yield the boxes of the foreign tensor that belong to one global tensor each."""
        rule, dims = self.rule, list(self.rule.order or range(len(self.tensor.shape)))
        counting = dims.pop(rule.unstack.dim) if rule.unstack else None
        for layer in range(1 if counting is None else self.tensor.shape[counting]):
            for piece, turn, first, size in self._pieces(dims):
                start, extent = [0] * len(self.tensor.shape), list(self.tensor.shape)
                if counting is not None:
                    start[counting], extent[counting] = layer, 1
                if rule.split:
                    start[dims[rule.split.dim]], extent[dims[rule.split.dim]] = first, size
                yield _Strip(
                    self,
                    self.called(piece, self._series(layer, turn)),
                    Box(tuple(start), tuple(extent)),
                    tuple((dim, self._key(piece, turn, line)) for line, dim in enumerate(dims)),
                    any(self._is_averaged(axis, use) for axis, use in self._uses(piece).items()),
                )

    def _pieces(self, dims: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """Yield (piece, turn, first, size) along the dim that is split, from its beginning to its end."""
        rule = self.rule
        if rule.split is None:
            yield 0, 0, 0, 0
            return
        repeat = evaluate(rule.split.repeat, self.scope)
        told = [evaluate(piece.size, self.scope) if piece.size else None for piece in rule.pieces]
        rest = self.tensor.shape[dims[rule.split.dim]] // repeat - sum(size or 0 for size in told)
        sizes = [rest // told.count(None) if size is None else size for size in told]
        first = 0
        for turn, (piece, size) in product(range(repeat), enumerate(sizes)):
            yield piece, turn, first, size
            first += size

    def _series(self, layer: int, turn: int) -> dict[str, int]:
        """Return the numbers of what is counted by a dim, or by the turns of a split."""
        counted = {}
        if self.rule.unstack:
            counted[self.rule.unstack.number] = layer
        if self.rule.split and self.rule.split.number:
            counted[self.rule.split.number] = turn
        return {name: count + _before(self.rule, name, self.scope) for name, count in counted.items()}

    def _uses(self, piece: int) -> dict[str, Use]:
        return {**self.rule.axes, **self.rule.pieces[piece].axes}

    def _is_averaged(self, axis: str, use: Use) -> bool:
        return use is Held.MEAN and self.scope.ranks(axis) > 1

    def _key(self, piece: int, turn: int, line: int) -> _Key:
        ranks = tuple(
            self.scope.rank(axis) // (evaluate(use.copies, self.scope) if use.copies else 1)
            for axis, use in self._uses(piece).items()
            if isinstance(use, Concat) and use.dim == line
        )
        if self.rule.split is None or self.rule.split.dim != line:
            return ranks, 0, 0
        return ranks, 0 if self.rule.split.number else turn, piece


def _read(
    words: tuple[Sequence[State], Sequence[Rule]], scope: Scope, number: int, tensor: Foreign
) -> _Reading | None:
    """Return the reading of a foreign tensor: as a state of a parameter, or as a tensor of its own."""
    states, rules = words
    for state in (*states, None):
        told = state.names.match(tensor.name) if state else {PARAMETER: tensor.name}
        if told is None:
            continue
        for rule in rules:
            found = rule.names.match(told[PARAMETER])
            if found is not None:
                for name in rule.numbers.keys() & found.keys():
                    found[name] = str(int(found[name]) + _before(rule, name, scope))
                rest = {name: text for name, text in told.items() if name != PARAMETER}
                captures = tuple(sorted(found.items()))
                return _Reading(number, tensor, scope, rule, captures, state, tuple(sorted(rest.items())))
    return None


def _before(rule: Rule, number: str, scope: Scope) -> int:
    """Return what is added to a number that a rank counts from 0."""
    return evaluate(rule.numbers[number].first, scope) if number in rule.numbers else 0


# ------------------------------------------------------------------------------------- one global tensor


def _laid_out(strips: Sequence[_Strip], scope: Scope) -> _Told:
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


def _parted(strip: _Strip, begin: Sequence[int], scope: Scope) -> tuple[Box, list[Padded]]:
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


def _share(strip: _Strip, box: Box, begin: list[int]) -> Share:
    rule, dims = strip.reading.rule, [dim for dim, _ in strip.lines]
    start, along = list(begin), {dim: line for line, dim in enumerate(dims)}
    if rule.stack:
        number = int(dict(strip.reading.captures)[rule.stack.number])
        start.insert(rule.stack.dim, number)
        along = {dim: line + (line >= rule.stack.dim) for dim, line in along.items()}
    copy = "" if rule.duplicate is Duplicate.NONE else str(rule)
    where = tuple(along.get(dim) for dim in range(len(box.size)))
    return Share(strip.reading.number, box, strip.name, tuple(start), where, copy, strip.is_mean)
