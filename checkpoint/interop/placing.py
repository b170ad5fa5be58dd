"""Reads what a rule document says of axes, of numbers that count within a rank, and of sizes."""

from collections.abc import Mapping

from checkpoint.errors import Misuse
from checkpoint.format.layout import AXES
from checkpoint.interop.document import Concat, Held, Numbering, RuleSet, Use
from checkpoint.interop.expression import Expression, Scope, Size, evaluate, parse_expression
from checkpoint.interop.marked import Marked


def read_uses(entry: Marked, names: set[str]) -> dict[str, Use]:
    """Read a table of axes: what each one does to a tensor. `names` are the sizes that there are."""
    return {axis: _use(axis, one, names) for axis, one in entry.fields("`axes`").rest().items()}


def read_numbering(entry: Marked, names: set[str]) -> Numbering:
    """Read how a number counts: `layers over pipeline`, or the axis, the first and the count one by one."""
    if entry.is_mapping:
        fields = entry.fields("a number")
        axis, first, count = fields.take("axis"), fields.take("first"), fields.take("count")
        fields.end()
        return Numbering(
            _axis(axis, axis.text("`axis`")),
            first.expression("`first`", names),
            count.expression("`count`", names),
        )
    words = entry.text("a number").split()
    if len(words) != 3 or words[1] != "over" or words[0] not in names:
        raise entry.wrong(f"a number is `SIZE over AXIS`, not {entry.text('a number')!r}")
    over = f"({words[0]}, {_axis(entry, words[2])})"
    return Numbering(words[2], parse_expression(f"first{over}"), parse_expression(f"share{over}"))


def read_size(entry: Marked, names: set[str]) -> Expression | Size | None:
    """Read a size's default: nothing, a list with one entry a rank, or an expression of earlier sizes."""
    if entry.is_null:
        return None
    if entry.is_list:
        return tuple(item.count("a size") for item in entry.items("a size"))
    return entry.expression("a size", names)


def resolve_sizes(rules: RuleSet, given: Mapping[str, Size]) -> dict[str, Size]:
    """Return the value of every size: what is given, else the document's default, worked out in order.

    Raises Misuse for a size that is neither given nor has a default, or that the document does not know.
    """
    unknown = sorted(given.keys() - rules.sizes.keys())
    if unknown:
        raise Misuse(f"{rules.name} knows no sizes {unknown}; it has {sorted(rules.sizes)}")
    sizes: dict[str, Size] = {}
    for name, default in rules.sizes.items():
        if name in given:
            sizes[name] = given[name]
        elif default is None:
            raise Misuse(f"{rules.name} has to be told the size {name!r} of the model")
        else:
            sizes[name] = (
                evaluate(default, Scope(sizes, {}, {})) if isinstance(default, Expression) else default
            )
    return sizes


def _use(axis: str, entry: Marked, names: set[str]) -> Use:
    _axis(entry, axis)
    if entry.is_mapping:
        fields = entry.fields("an axis")
        dim, size, copies = fields.take("dim"), fields.find("size"), fields.find("copies")
        fields.end()
        return Concat(
            dim.count("`dim`"),
            size.expression("`size`", names) if size else None,
            copies.expression("`copies`", names) if copies else None,
        )
    text = entry.text("an axis")
    if text.isdigit():
        return Concat(entry.count("a dim"))
    try:
        return Held(text)
    except ValueError:
        words = ", ".join(one.value for one in Held)
        raise entry.wrong(f"an axis is a dim to concatenate, or one of {words}; not {text!r}") from None


def _axis(entry: Marked, name: str) -> str:
    if name not in AXES:
        raise entry.wrong(f"there is no axis {name!r}: there are {', '.join(AXES)}")
    return name
