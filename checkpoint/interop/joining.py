"""Joining the ranks: where in a global tensor each leaf lies, and whether all are there that have to be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from checkpoint.errors import FormatError, Incomplete, Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.cutting import Leaf, names_of, source_box
from checkpoint.interop.document import Concat, Held, Rule, Use
from checkpoint.interop.expression import evaluate
from checkpoint.interop.moves import Foreign, How
from checkpoint.interop.naming import Case, Model

Key = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class Landing:
    """A move, with the global tensor by name; `shape` is the shape that this case gives it."""

    name: str
    shape: tuple[int, ...]
    source: int
    source_box: Box
    box: Box
    how: How


@dataclass(frozen=True, slots=True)
class Joined:
    """What a case comes to: where everything lands, and what is padding."""

    landings: tuple[Landing, ...]
    padding: tuple[tuple[int, Box], ...]


def join(model: Model, case: Case, foreign: Sequence[Foreign], leaves: Sequence[Leaf]) -> Joined:
    """Put the leaves of all ranks of one case together.

    Raises Incomplete if a rank is missing, Mismatch if the ranks do not fit each other, FormatError if the
    rule does not say what an axis of the checkpoint means.
    """
    by_name: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_name.setdefault(leaf.name, []).append(leaf)
    joins = [_Join(model, case.rule, foreign, group) for group in by_name.values()]
    landings = tuple(landing for one in joins for landing in one.landings(case))
    return Joined(landings, tuple(padding for one in joins for padding in one.padding))


def join_single(model: Model, case: Case, foreign: Sequence[Foreign], sources: Sequence[int]) -> Joined:
    """Give a parameter's one number to all global tensors that its parts belong to. Raises Mismatch."""
    landings = []
    for source in sources:
        tensor = foreign[source]
        if math.prod(tensor.shape) != 1:
            raise Mismatch(
                f"{tensor} has the shape {tensor.shape}, where one number for a parameter should be"
            )
        whole = Box.whole(tensor.shape)
        for name in dict.fromkeys(names_of(model, case, tensor)):
            landings.append(Landing(name, tensor.shape, source, whole, whole, How.FILL))
    return Joined(tuple(landings), ())


def uses_of(rule: Rule, piece: int) -> dict[str, Use]:
    """Return what each axis does to a piece of a rule: what the piece says, else what the rule says."""
    return {**rule.axes, **rule.pieces[piece].axes}


def concats_on(model: Model, rule: Rule, piece: int, dim: int) -> list[tuple[str, int]]:
    """Return which axes divide a dim of a piece, outermost first, each with how many ranks hold a copy."""
    found = []
    for axis, use in uses_of(rule, piece).items():
        if isinstance(use, Concat) and use.dim == dim:
            found.append((axis, _copies(model, rule, axis, use)))
    return found


def _copies(model: Model, rule: Rule, axis: str, use: Concat) -> int:
    copies = evaluate(use.copies, model.scope({})) if use.copies else 1
    ranks = model.axes.get(axis, 1)
    if copies < 1 or ranks % copies:
        raise FormatError(f"{rule}: {ranks} ranks of {axis!r} cannot hold {copies} copies of each part")
    return copies


class _Join:
    """Puts together all leaves that go to one global tensor."""

    def __init__(self, model: Model, rule: Rule, foreign: Sequence[Foreign], leaves: Sequence[Leaf]) -> None:
        self._model = model
        self._rule = rule
        self._foreign = foreign
        self._leaves = leaves
        self._name = leaves[0].name
        self._shape, self._boxes = self._place()
        self.padding: list[tuple[int, Box]] = []

    def landings(self, case: Case) -> list[Landing]:
        """Return where each leaf lands; boxes that several ranks hold say so. Collects the padding."""
        landings: list[Landing] = []
        at_box: dict[Box, list[Leaf]] = {}
        for leaf, box in zip(self._leaves, self._boxes, strict=True):
            if box.is_empty:  # nobody's; it only tells the shape
                shape, stacked = self._stack(case, box)
                source = source_box(self._rule, leaf, leaf.body)
                landings.append(Landing(self._name, shape, leaf.source, source, stacked, How.FILL))
            else:
                at_box.setdefault(box, []).append(leaf)
        for box, holders in at_box.items():
            for leaf, how in zip(holders, self._hows(holders), strict=True):
                keep, rest = self._strip(box, leaf.body)
                self.padding += [(leaf.source, source_box(self._rule, leaf, body)) for body in rest]
                for real, body in keep:
                    shape, stacked = self._stack(case, real)
                    source = source_box(self._rule, leaf, body)
                    landings.append(Landing(self._name, shape, leaf.source, source, stacked, how))
        return landings

    def _at(self, leaf: Leaf, axis: str) -> int:
        return self._foreign[leaf.source].at.get(axis, 0)

    # ------------------------------------------------------------------------------- where each leaf lies

    def _place(self) -> tuple[tuple[int, ...], list[Box]]:
        """Return the shape of the global tensor, padding included, and the box of each leaf in it."""
        starts: list[list[int]] = [[] for _ in self._leaves]
        shape = []
        for dim in range(len(self._leaves[0].body.size)):
            self._check_ranks(dim)
            keys = [self._key(leaf, dim) for leaf in self._leaves]
            sizes = self._sizes(keys, dim)
            origin, at = 0, {}
            for key in sorted(sizes):
                at[key], origin = origin, origin + sizes[key]
            shape.append(origin)
            for start, key in zip(starts, keys, strict=True):
                start.append(at[key])
        boxes = [Box(tuple(a), leaf.body.size) for a, leaf in zip(starts, self._leaves, strict=True)]
        return tuple(shape), boxes

    def _key(self, leaf: Leaf, dim: int) -> Key:
        """Return what orders leaves along a dim: ranks of axes that divide it, then the turn of the split."""
        concats = concats_on(self._model, self._rule, leaf.piece, dim)
        ranks = tuple(self._at(leaf, axis) // copies for axis, copies in concats)
        if self._rule.split and self._rule.split.dim == dim:
            return ranks, leaf.turn, leaf.piece
        return ranks, 0, 0

    def _sizes(self, keys: Sequence[Key], dim: int) -> dict[Key, int]:
        sizes: dict[Key, int] = {}
        for key, leaf in zip(keys, self._leaves, strict=True):
            size = leaf.body.size[dim]
            if sizes.setdefault(key, size) != size:
                raise Mismatch(
                    f"{self._name}: the ranks do not agree on dim {dim}, which has {sizes[key]} elements, "
                    f"but {size} in {self._foreign[leaf.source]}"
                )
        return sizes

    def _check_ranks(self, dim: int) -> None:
        """See that every rank of the axes that divide a dim is there, and has as much as the rule says."""
        piece = self._leaves[0].piece
        for axis, copies in concats_on(self._model, self._rule, piece, dim):
            there = {self._at(leaf, axis) // copies for leaf in self._leaves}
            missing = set(range(self._model.axes.get(axis, 1) // copies)) - there
            if missing:
                ranks = [part * copies for part in sorted(missing)]
                raise Incomplete(
                    f"{self._name}: nothing of it is there from {axis} ranks {ranks} ({self._rule})"
                )
            use = uses_of(self._rule, piece)[axis]
            is_split = self._rule.split is not None and self._rule.split.dim == dim
            if isinstance(use, Concat) and use.size is not None and not is_split:
                for leaf in self._leaves:
                    source = self._foreign[leaf.source]
                    size = evaluate(use.size, self._model.scope(source.at))
                    if leaf.body.size[dim] != size:
                        raise Mismatch(
                            f"{source} has {leaf.body.size[dim]} along dim {dim}, not {size} ({self._rule})"
                        )

    # --------------------------------------------------------------------------------- who has to hold it

    def _hows(self, holders: Sequence[Leaf]) -> list[How]:
        """Return what each holder of one box does, having seen that they are those who have to hold it."""
        axes = list(self._model.axes)
        there = [tuple(self._at(leaf, axis) for axis in axes) for leaf in holders]
        piece = holders[0].piece
        wanted = [self._holding(piece, axis, rank) for axis, rank in zip(axes, there[0], strict=True)]
        missing = sorted(set(product(*wanted)) - set(there))
        if missing:
            where = _ranks(axes, missing[0])
            raise Incomplete(f"{self._name}: a copy of it should be at {where}, and is not ({self._rule})")
        extra = sorted(set(there) - set(product(*wanted)))
        if extra:
            raise Mismatch(
                f"{self._name}: it is at {_ranks(axes, extra[0])} a second time, against {self._rule}"
            )
        uses = uses_of(self._rule, piece)
        averaged = [axis for axis in axes if uses.get(axis) is Held.MEAN and self._model.axes[axis] > 1]
        if not averaged:
            return [How.FILL] + [How.SAME] * (len(holders) - 1)
        if len(holders) != math.prod(self._model.axes[axis] for axis in averaged):
            raise FormatError(f"{self._rule} averages over {averaged} and has copies over other axes as well")
        return [How.MEAN] * len(holders)

    def _holding(self, piece: int, axis: str, rank: int) -> set[int]:
        """Return which ranks of an axis hold the same as this one. Raises FormatError if no rule says."""
        ranks = self._model.axes[axis]
        if ranks == 1 or any(one.axis == axis for one in self._rule.numbers.values()):
            return {rank}
        match uses_of(self._rule, piece).get(axis):
            case Concat() as use:
                copies = _copies(self._model, self._rule, axis, use)
                return set(range(rank - rank % copies, rank - rank % copies + copies))
            case Held.SAME | Held.MEAN:
                return set(range(ranks))
            case Held.FIRST:
                return {0}
            case Held.LAST:
                return {ranks - 1}
            case Held.ENDS:
                return {0, ranks - 1}
            case Held.ONE:
                return {rank}
            case None:
                raise FormatError(
                    f"{self._rule} does not say what the {ranks} ranks of the axis {axis!r} hold"
                )

    # ------------------------------------------------------------------------------- padding and stacking

    def _strip(self, box: Box, body: Box) -> tuple[list[tuple[Box, Box]], list[Box]]:
        """Part a box from its padding: return the real (box, body), if any, and the padding in the body."""
        padding = self._rule.padding
        if padding is None:
            return [(box, body)], []
        dim, real = padding.dim, evaluate(padding.real, self._model.scope({}))
        total = evaluate(padding.total, self._model.scope({}))
        if dim >= len(self._shape) or self._shape[dim] != total or not 0 < real <= total:
            raise Mismatch(
                f"{self._name}: dim {dim} of {self._shape} should have {padding.real.text} = {real} real "
                f"elements, and {padding.total.text} = {total} with the padding ({self._rule})"
            )
        keep = max(0, min(box.size[dim], real - box.start[dim]))
        kept = [(_along(box, dim, 0, keep), _along(body, dim, 0, keep))] if keep else []
        rest = body.size[dim] - keep
        return kept, [_along(body, dim, keep, rest)] if rest else []

    def _stack(self, case: Case, box: Box) -> tuple[tuple[int, ...], Box]:
        """Return the global tensor's shape, without padding and with the stacked dim, and a box in it."""
        shape, rule = self._shape, self._rule
        if rule.padding:
            dim, real = rule.padding.dim, evaluate(rule.padding.real, self._model.scope({}))
            shape = (*shape[:dim], real, *shape[dim + 1 :])
        if rule.stack is None:
            return shape, box
        dim, count = rule.stack.dim, evaluate(rule.stack.count, self._model.scope({}))
        text = str(dict(case.captures)[rule.stack.number])
        if not text.isdecimal() or int(text) >= count or dim > len(shape):
            raise Mismatch(f"{self._name}: {text!r} is none of the {count} numbers that {rule} stacks")
        start, size = box.start, box.size
        stacked = Box((*start[:dim], int(text), *start[dim:]), (*size[:dim], 1, *size[dim:]))
        return (*shape[:dim], count, *shape[dim:]), stacked


def _ranks(axes: Sequence[str], ranks: Sequence[int]) -> str:
    return ", ".join(f"{axis}={rank}" for axis, rank in zip(axes, ranks, strict=True)) or "the one rank"


def _along(box: Box, dim: int, first: int, count: int) -> Box:
    start, size = list(box.start), list(box.size)
    start[dim], size[dim] = start[dim] + first, count
    return Box(tuple(start), tuple(size))
