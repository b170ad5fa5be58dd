"""Integer expressions of the rule language: sizes, places on axes, comparisons. Never executed as code.

    names         a size of the document; a list counts as its sum
    operators     + - * // %   == != < <= > >=   and or not   ( )
    functions     rank(AXIS)   ranks(AXIS)   share(N, AXIS)   first(N, AXIS)   min(...)   max(...)

share(N, AXIS) is how much of N the rank at hand has: its entry where N is a list, else N over the ranks of
the axis, which has to come out; first(N, AXIS) is what the ranks before it have together.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from checkpoint.errors import FormatError, Misuse

Size = int | tuple[int, ...]
MAX_LENGTH = 300
_LIMIT = 1 << 60

_BINARY: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ON_AXES = {"rank": 1, "ranks": 1, "share": 2, "first": 2}  # how many arguments each takes


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression; its text says what it is."""

    text: str
    tree: ast.expr = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Scope:
    """What names mean: sizes, how many ranks each axis has, where on them a shard is."""

    sizes: Mapping[str, Size]
    axes: Mapping[str, int]
    at: Mapping[str, int]

    def ranks(self, axis: str) -> int:
        """Return how many ranks an axis has: one, if the checkpoint is not divided over it."""
        return self.axes.get(axis, 1)

    def rank(self, axis: str) -> int:
        """Return the shard's place on an axis."""
        return self.at.get(axis, 0)


def parse_expression(text: str) -> Expression:
    """Read an expression. Raises FormatError naming what the language does not have."""
    if len(text) > MAX_LENGTH:
        raise FormatError(f"an expression has at most {MAX_LENGTH} characters: {text[:40]!r} ...")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormatError(f"{text!r} is no expression: {error}") from error
    _check(tree, text)
    return Expression(text, tree)


def names_in(expression: Expression) -> set[str]:
    """Return the names of sizes and numbers that an expression uses; axes are not among them."""
    found = set()
    stack: list[ast.AST] = [expression.tree]
    while stack:
        node = stack.pop()
        match node:
            case ast.Name(id=name):
                found.add(name)
            case ast.Call(func=ast.Name(id=name), args=args):
                stack += args[:-1] if name in _ON_AXES else args
            case _:
                stack += ast.iter_child_nodes(node)
    return found


def evaluate(expression: Expression, scope: Scope) -> int:
    """Work an expression out. Raises Misuse saying which one, and what is wrong with it."""
    try:
        value = _value(expression.tree, scope)
    except (FormatError, ZeroDivisionError) as error:
        raise Misuse(f"{expression.text!r} cannot be worked out: {error}") from error
    return value


def _check(node: ast.AST, text: str) -> None:
    match node:
        case ast.Constant(value=value) if type(value) is int or value is True or value is False:
            return
        case ast.Name():
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            children: list[ast.expr] = [left, right]
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            children = [operand]
        case ast.BoolOp(values=values):
            children = values
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            children = [left, right]
        case ast.Call(func=ast.Name(id="min" | "max"), args=[_, *_] as args, keywords=[]):
            children = args
        case ast.Call(func=ast.Name(id=name), args=[*args, ast.Name()], keywords=[]) if (
            _ON_AXES.get(name) == len(args) + 1
        ):
            children = args
        case _:
            raise FormatError(f"the rule language has no {ast.unparse(node)!r} (in {text!r})")
    for child in children:
        _check(child, text)


def _value(node: ast.expr, scope: Scope) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return int(number)
        case ast.Name(id=name):
            return _total(_named(name, scope))
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_BINARY[type(op)](_value(left, scope), _value(right, scope)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, scope)
        case ast.UnaryOp(operand=operand):
            return int(not _value(operand, scope))
        case ast.BoolOp(op=ast.And(), values=values):
            return int(all(_value(one, scope) for one in values))
        case ast.BoolOp(values=values):
            return int(any(_value(one, scope) for one in values))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return int(_COMPARE[type(op)](_value(left, scope), _value(right, scope)))
        case ast.Call(func=ast.Name(id=name), args=args) if name in _ON_AXES:
            return _on_axis(name, args, scope)
        case ast.Call(func=ast.Name(id=name), args=args):
            return (min if name == "min" else max)(_value(one, scope) for one in args)
    raise FormatError(f"there is no {ast.unparse(node)!r}")


def _on_axis(name: str, args: list[ast.expr], scope: Scope) -> int:
    axis = args[-1].id if isinstance(args[-1], ast.Name) else ""
    rank, ranks = scope.rank(axis), scope.ranks(axis)
    if name in ("rank", "ranks"):
        return rank if name == "rank" else ranks
    size = _named(args[0].id, scope) if isinstance(args[0], ast.Name) else _value(args[0], scope)
    entries = _entries(size, axis, ranks, args[0])
    return entries[rank] if name == "share" else sum(entries[:rank])


def _entries(size: Size, axis: str, ranks: int, what: ast.expr) -> tuple[int, ...]:
    """Return what each rank of an axis has."""
    if isinstance(size, tuple):
        if len(size) != ranks:
            raise FormatError(
                f"{ast.unparse(what)} lists {len(size)} ranks, but the axis {axis!r} has {ranks}"
            )
        return size
    if size % ranks:
        raise FormatError(
            f"{ast.unparse(what)} = {size} does not come out over the {ranks} ranks of {axis!r}: "
            "list how much each has"
        )
    return (size // ranks,) * ranks


def _named(name: str, scope: Scope) -> Size:
    if name not in scope.sizes:
        raise FormatError(f"there is no size {name!r}; there are {sorted(scope.sizes)}")
    return scope.sizes[name]


def _total(size: Size) -> int:
    return sum(size) if isinstance(size, tuple) else size


def _bounded(value: int) -> int:
    if abs(value) > _LIMIT:
        raise FormatError(f"{value} is beyond every tensor")
    return value
