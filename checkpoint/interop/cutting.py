"""Cutting a foreign tensor: which boxes of it belong to which global tensor, rank by rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.document import Rule, Split
from checkpoint.interop.expression import evaluate
from checkpoint.interop.moves import Foreign
from checkpoint.interop.naming import Case, Model


@dataclass(frozen=True, slots=True)
class Leaf:
    """A box of a foreign tensor that belongs to one global tensor.

    `body` is in the coordinates of the tensor as the rule turns it (transposed, without the unstacked dim,
    at `index` of which it lies); `turn` counts the repetitions of a split that go to the same tensor.
    """

    source: int
    name: str
    piece: int
    turn: int
    index: int
    body: Box


def cut(model: Model, case: Case, source: int, foreign: Foreign) -> Iterator[Leaf]:
    """Yield the leaves of a foreign tensor; together they hold each of its elements once.

    Raises Mismatch if the tensor is not of the shape that the rule speaks of.
    """
    rule, shape = case.rule, body_shape(model, case.rule, foreign)
    parts = _pieces(model, rule, rule.split, foreign, shape) if rule.split else [(0, 0, Box.whole(shape))]
    for index, series in _unstacked(model, rule, foreign.at):
        for piece, turn, box in parts:
            name = case.target(piece, {**series, **_turn_number(model, rule, turn, foreign.at)})
            yield Leaf(source, name, piece, 0 if rule.split and rule.split.number else turn, index, box)


def names_of(model: Model, case: Case, foreign: Foreign) -> list[str]:
    """Return the global names that the parts of a foreign tensor of this case would have."""
    rule, names = case.rule, []
    for _, series in _unstacked(model, rule, foreign.at):
        for turn in range(repeat_of(model, rule, foreign.at) if rule.split and rule.split.number else 1):
            turned = {**series, **_turn_number(model, rule, turn, foreign.at)}
            names += [case.target(piece, turned) for piece in range(len(rule.pieces))]
    return names


def body_shape(model: Model, rule: Rule, foreign: Foreign) -> tuple[int, ...]:
    """Return a foreign tensor's shape as the rule turns it. Raises Mismatch if the rule has other dims."""
    shape = foreign.shape
    if rule.order is not None:
        if len(rule.order) != len(shape):
            raise Mismatch(f"{foreign} has the shape {shape}; {rule} transposes {len(rule.order)} dims")
        shape = tuple(shape[dim] for dim in rule.order)
    if rule.unstack:
        _check_dim(rule, foreign, rule.unstack.dim, len(shape))
        count = evaluate(rule.unstack.count, model.scope(foreign.at))
        if shape[rule.unstack.dim] != count:
            told = f"{rule} unstacks its dim {rule.unstack.dim} into {count}"
            raise Mismatch(f"{foreign} has the shape {foreign.shape}; {told}")
        shape = (*shape[: rule.unstack.dim], *shape[rule.unstack.dim + 1 :])
    return shape


def source_box(rule: Rule, leaf: Leaf, body: Box) -> Box:
    """Return a part of a leaf in the foreign tensor's own coordinates."""
    start, size = body.start, body.size
    if rule.unstack:
        dim = rule.unstack.dim
        start, size = (*start[:dim], leaf.index, *start[dim:]), (*size[:dim], 1, *size[dim:])
    if rule.order is not None:
        back = [rule.order.index(dim) for dim in range(len(start))]
        start, size = tuple(start[dim] for dim in back), tuple(size[dim] for dim in back)
    return Box(start, size)


def repeat_of(model: Model, rule: Rule, at: Mapping[str, int]) -> int:
    """Return how often the pieces of a rule's split are repeated on a rank."""
    return evaluate(rule.split.repeat, model.scope(at)) if rule.split else 1


def _unstacked(model: Model, rule: Rule, at: Mapping[str, int]) -> list[tuple[int, dict[str, int]]]:
    """Return (index, what number it is) along the unstacked dim; one without a number if there is none."""
    if rule.unstack is None:
        return [(0, {})]
    first = _first(model, rule, rule.unstack.number, at)
    count = evaluate(rule.unstack.count, model.scope(at))
    return [(index, {rule.unstack.number: first + index}) for index in range(count)]


def _pieces(
    model: Model, rule: Rule, split: Split, foreign: Foreign, shape: tuple[int, ...]
) -> list[tuple[int, int, Box]]:
    """Return (piece, turn, box) for every part of a split dim, in its order."""
    _check_dim(rule, foreign, split.dim, len(shape))
    repeat = repeat_of(model, rule, foreign.at)
    sizes = _piece_sizes(model, rule, foreign, shape[split.dim], repeat)
    parts, origin = [], 0
    for turn in range(repeat):
        for piece, size in enumerate(sizes):
            start = tuple(origin if dim == split.dim else 0 for dim in range(len(shape)))
            extent = tuple(size if dim == split.dim else n for dim, n in enumerate(shape))
            parts.append((piece, turn, Box(start, extent)))
            origin += size
    return parts


def _piece_sizes(model: Model, rule: Rule, foreign: Foreign, length: int, repeat: int) -> list[int]:
    """Return how large each piece is in one turn: as the rule says, or an equal part of what it leaves."""
    scope = model.scope(foreign.at)
    given = [evaluate(piece.size, scope) if piece.size else None for piece in rule.pieces]
    known = [size for size in given if size is not None]
    num_open = len(given) - len(known)
    rest = length // max(repeat, 1) - sum(known)
    comes_out = repeat > 0 and length % repeat == 0 and rest >= 0 and min(known, default=0) >= 0
    if not comes_out or (rest % num_open if num_open else rest):
        raise Mismatch(
            f"{foreign} has the shape {foreign.shape}; {rule} splits {length} into {len(rule.pieces)} pieces "
            f"(given sizes: {known}), {repeat} times, which does not come out"
        )
    return [rest // num_open if size is None else size for size in given]


def _turn_number(model: Model, rule: Rule, turn: int, at: Mapping[str, int]) -> dict[str, int]:
    if rule.split is None or rule.split.number is None:
        return {}
    return {rule.split.number: _first(model, rule, rule.split.number, at) + turn}


def _first(model: Model, rule: Rule, number: str, at: Mapping[str, int]) -> int:
    """Return the global number of the first of a series that a rank has."""
    return evaluate(rule.numbers[number].first, model.scope(at)) if number in rule.numbers else 0


def _check_dim(rule: Rule, foreign: Foreign, dim: int, ndim: int) -> None:
    if dim >= ndim:
        raise Mismatch(f"{foreign} has the shape {foreign.shape}; {rule} speaks of its dim {dim}")
