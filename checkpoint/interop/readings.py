"""Readings: what one foreign tensor is by the words of rules, and which strips of global ones are in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from checkpoint.format.box import Box
from checkpoint.interop.document import Concat, Held, Rule, RuleSet, State, Use
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.grammar import PARAMETER
from checkpoint.interop.moves import Foreign

Key = tuple[tuple[int, ...], int, int]  # what comes first along a dim: by ranks, turn, piece


def readings_of(
    rules: RuleSet, sizes: Mapping[str, Size], axes: Mapping[str, int], foreign: Mapping[int, Foreign]
) -> "dict[int, Reading | None]":
    """Read foreign tensors, by number; what no rule speaks of, or one drops, is None. Sizes are resolved."""
    words = (rules.states, active_rules(rules, Scope(sizes, axes, {})))
    read = {number: _read(words, Scope(sizes, axes, one.at), number, one) for number, one in foreign.items()}
    return {number: None if one is None or one.rule.is_dropped else one for number, one in read.items()}


def active_rules(rules: RuleSet, anywhere: Scope) -> list[Rule]:
    """Return the rules whose condition holds."""
    return [one for one in rules.rules if one.when is None or evaluate(one.when, anywhere)]


@dataclass(frozen=True, slots=True)
class Strip:
    """A box of a foreign tensor, for one global tensor; `lines` lists its dims there.

    Each line is the foreign dim that runs along it, and what orders the strips along it.
    """

    reading: "Reading"
    name: str
    box: Box
    lines: tuple[tuple[int, Key], ...]
    is_mean: bool


@dataclass(frozen=True, slots=True)
class Reading:
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

    def strips(self) -> Iterator[Strip]:
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
                yield Strip(
                    self,
                    self.called(piece, self._series(layer, turn)),
                    Box(tuple(start), tuple(extent)),
                    tuple((dim, self._key(piece, turn, line)) for line, dim in enumerate(dims)),
                    any(self._is_averaged(axis, use) for axis, use in self.uses(piece).items()),
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

    def uses(self, piece: int) -> dict[str, Use]:
        """Return what each axis does to a piece."""
        return {**self.rule.axes, **self.rule.pieces[piece].axes}

    def _is_averaged(self, axis: str, use: Use) -> bool:
        return use is Held.MEAN and self.scope.ranks(axis) > 1

    def _key(self, piece: int, turn: int, line: int) -> Key:
        ranks = tuple(
            self.scope.rank(axis) // (evaluate(use.copies, self.scope) if use.copies else 1)
            for axis, use in self.uses(piece).items()
            if isinstance(use, Concat) and use.dim == line
        )
        if self.rule.split is None or self.rule.split.dim != line:
            return ranks, 0, 0
        return ranks, 0 if self.rule.split.number else turn, piece


def _read(
    words: tuple[Sequence[State], Sequence[Rule]], scope: Scope, number: int, tensor: Foreign
) -> Reading | None:
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
                return Reading(number, tensor, scope, rule, captures, state, tuple(sorted(rest.items())))
    return None


def _before(rule: Rule, number: str, scope: Scope) -> int:
    """Return what is added to a number that a rank counts from 0."""
    return evaluate(rule.numbers[number].first, scope) if number in rule.numbers else 0
