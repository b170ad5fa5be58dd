"""Reads rule documents: YAML in, a `RuleSet` out, or an error with its line. docs/rules.md is the grammar."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from checkpoint.errors import FormatError
from checkpoint.format.dtypes import dtype_of
from checkpoint.interop.document import (
    Declared,
    Duplicate,
    Numbering,
    Padding,
    Piece,
    Rule,
    RuleSet,
    Split,
    Stack,
    State,
    Use,
)
from checkpoint.interop.expression import Expression, Size, parse_expression
from checkpoint.interop.marked import Marked, MarkedFields, read_yaml
from checkpoint.interop.placing import read_numbering, read_size, read_uses
from checkpoint.interop.template import Template

VERSION = 1
PARAMETER = "param"
_ONE = parse_expression("1")


def read_rules(text: str, document: str, find: Callable[[str], str] | None = None) -> RuleSet:
    """Read a rule document. `find` returns the text of a document that this one extends.

    Raises FormatError naming the line.
    """
    root = read_yaml(text, document)
    fields = root.fields("a rule document")
    version = fields.take("rules")
    if version.count("the version") != VERSION:
        raise version.wrong(f"this reads version {VERSION} of the rule language; upgrade to read a later one")
    base = _extended(fields.find("extends"), find)
    reader = _Reader(base)
    reader.read_tables(fields)
    rules = [reader.rule(item) for item in _items(fields, "map")]
    states = [reader.state(item) for item in _items(fields, "states")]
    tensors = [reader.declared(item) for item in _items(fields, "tensors")]
    name = fields.find("name")
    about = fields.find("about")
    fields.end()
    return RuleSet(
        name.text("the name") if name else document,
        about.text("`about`") if about else "",
        reader.sizes,
        (*base.rules, *rules),
        (*base.states, *states),
        (*base.tensors, *tensors),
    )


def _extended(entry: Marked | None, find: Callable[[str], str] | None) -> RuleSet:
    if entry is None:
        return RuleSet("", "", {}, (), (), ())
    name = entry.text("`extends`")
    if find is None:
        raise entry.wrong(f"there is nowhere to find the document {name!r} that this one extends")
    base = read_rules(find(name), name)
    if base.rules:
        raise entry.wrong(f"{name!r} has rules of its own: only sizes and tensors can be extended")
    return base


def _items(fields: MarkedFields, name: str) -> list[Marked]:
    entry = fields.find(name)
    return entry.items(f"`{name}`") if entry else []


@dataclass(frozen=True, slots=True)
class _Names:
    """What a rule's templates and expressions may speak of."""

    known: Mapping[str, str]  # the pattern of each capture
    captures: set[str]
    sizes: set[str]


class _Reader:
    """Reads the parts of a document, in the light of its tables of sizes, axes and numbers."""

    def __init__(self, base: RuleSet) -> None:
        self.sizes: dict[str, Expression | Size | None] = dict(base.sizes)
        self._axes: dict[str, Use] = {}
        self._numbers: dict[str, Numbering] = {}

    def read_tables(self, fields: MarkedFields) -> None:
        """Read the sizes, what axes mean by default, and which numbers count within a rank."""
        if entry := fields.find("sizes"):
            for name, value in entry.fields("`sizes`").rest().items():
                self.sizes[name] = read_size(value, set(self.sizes))
        names = set(self.sizes)
        if entry := fields.find("axes"):
            self._axes = read_uses(entry, names)
        if entry := fields.find("numbers"):
            numbers = entry.fields("`numbers`").rest()
            self._numbers = {name: read_numbering(one, names) for name, one in numbers.items()}

    def rule(self, item: Marked) -> Rule:
        """Read one entry of `map`."""
        fields = item.fields("a rule")
        source = fields.take("from").template("`from`")
        drop, copy, dtype, when = (fields.find(name) for name in ("drop", "copy", "dtype", "when"))
        condition = when.expression("`when`", set(self.sizes)) if when else None
        if drop and drop.flag("`drop`"):
            fields.end()
            return Rule(item.line, source, (), {}, {}, when=condition, is_dropped=True)
        names = _Names(source.patterns, source.captures, set(self.sizes))
        unstack = self._stack(fields.find("unstack"), "`unstack`", names)
        series = {unstack.number} if unstack else set()
        split, pieces = self._split(fields, names, series)
        series |= {split.number} if split and split.number else set()
        numbers = {name: one for name, one in self._numbers.items() if name in source.captures | series}
        axes = self._all_uses(item, fields.find("axes"), numbers, names)
        order, padding = fields.find("transpose"), fields.find("pad")
        stack = self._stack(fields.find("stack"), "`stack`", names)
        fields.end()
        return Rule(
            line=item.line,
            names=source,
            pieces=pieces,
            axes=axes,
            numbers=numbers,
            order=_order(order) if order else None,
            unstack=unstack,
            split=split,
            padding=self._padding(padding, names) if padding else None,
            stack=stack,
            dtype=_dtype(dtype) if dtype else None,
            when=condition,
            duplicate=_duplicate(copy) if copy else Duplicate.NONE,
        )

    def state(self, item: Marked) -> State:
        """Read one entry of `states`."""
        fields = item.fields("a state")
        source = fields.take("from").template("`from`", {PARAMETER: ".+"})
        target = fields.take("to").template("`to`", source.patterns)
        if PARAMETER not in source.captures or target.captures != source.captures:
            raise item.wrong(f"both names of a state have {{{PARAMETER}}} in them, and the same captures")
        dtype, single, optional = (fields.find(name) for name in ("dtype", "single", "optional"))
        fields.end()
        return State(
            item.line,
            source,
            target,
            _dtype(dtype) if dtype else None,
            single.flag("`single`") if single else False,
            optional.flag("`optional`") if optional else False,
        )

    def declared(self, item: Marked) -> Declared:
        """Read one entry of `tensors`."""
        fields = item.fields("a tensor")
        template = fields.take("name").template("`name`")
        each, when = fields.find("each"), fields.find("when")
        counts = each.fields("`each`").rest() if each else {}
        if set(counts) != template.captures:
            raise item.wrong(f"`each` has to count {sorted(template.captures)}, the captures of the name")
        names = set(self.sizes)
        shape = fields.take("shape").items("`shape`")
        fields.end()
        return Declared(
            item.line,
            template,
            {name: count.expression("a count", names) for name, count in counts.items()},
            tuple(dim.expression("a dim", names) for dim in shape),
            when.expression("`when`", names) if when else None,
        )

    # ---------------------------------------------------------------------------------- parts of a rule

    def _split(
        self, fields: MarkedFields, names: _Names, series: set[str]
    ) -> tuple[Split | None, tuple[Piece, ...]]:
        entry = fields.find("split")
        if entry is None:
            target = fields.take("to")
            return None, (Piece(_target(target, names, series), None, {}),)
        inner = entry.fields("`split`")
        dim, repeat, number = inner.take("dim").count("`dim`"), inner.find("repeat"), inner.find("number")
        split = Split(
            dim,
            repeat.expression("`repeat`", names.sizes) if repeat else _ONE,
            number.text("`number`") if number else None,
        )
        series = series | ({split.number} if split.number else set())
        pieces = [self._piece(item, names, series) for item in inner.take("pieces").items("`pieces`")]
        if not pieces:
            raise entry.wrong("a split has at least one piece")
        inner.end()
        return split, tuple(pieces)

    def _piece(self, item: Marked, names: _Names, series: set[str]) -> Piece:
        fields = item.fields("a piece")
        target, size, axes = fields.take("to"), fields.find("size"), fields.find("axes")
        fields.end()
        return Piece(
            _target(target, names, series),
            size.expression("`size`", names.sizes) if size else None,
            read_uses(axes, names.sizes) if axes else {},
        )

    def _stack(self, entry: Marked | None, what: str, names: _Names) -> Stack | None:
        if entry is None:
            return None
        fields = entry.fields(what)
        dim, number, count = fields.take("dim"), fields.take("number"), fields.take("count")
        fields.end()
        stack = Stack(dim.count("`dim`"), number.text("`number`"), count.expression("`count`", names.sizes))
        if (stack.number in names.captures) == (what == "`unstack`"):
            wanted = "a new name, for `to`" if what == "`unstack`" else "a capture of `from`"
            raise number.wrong(f"the number of {what} is {wanted}, not {stack.number!r}")
        return stack

    def _padding(self, entry: Marked, names: _Names) -> Padding:
        fields = entry.fields("`pad`")
        dim, real, total = fields.take("dim"), fields.take("real"), fields.take("total")
        fields.end()
        return Padding(
            dim.count("`dim`"),
            real.expression("`real`", names.sizes),
            total.expression("`total`", names.sizes),
        )

    def _all_uses(
        self, rule: Marked, entry: Marked | None, numbers: Mapping[str, Numbering], names: _Names
    ) -> dict[str, Use]:
        """Return what each axis means to a rule: its own word or the document's; none for numbered ones."""
        own = read_uses(entry, names.sizes) if entry else {}
        numbered = {one.axis for one in numbers.values()}
        if numbered & own.keys():
            raise rule.wrong(f"the axes {sorted(numbered & own.keys())} are told by the numbers in the name")
        return {axis: use for axis, use in {**self._axes, **own}.items() if axis not in numbered}


def _target(entry: Marked, names: _Names, series: set[str]) -> Template:
    known = {**dict.fromkeys(series, r"[0-9]+"), **names.known}
    target = entry.template("`to`", known)
    if target.captures - names.captures - series:
        raise entry.wrong(f"{sorted(target.captures - names.captures - series)} are not captured by `from`")
    if series - target.captures:
        raise entry.wrong(f"`to` has to tell the tensors of a series apart by {sorted(series)}")
    return target


def _duplicate(entry: Marked) -> Duplicate:
    text = entry.text("`copy`")
    if text not in ("optional", "required"):
        raise entry.wrong(f"`copy` is optional or required, not {text!r}")
    return Duplicate(text)


def _order(entry: Marked) -> tuple[int, ...]:
    order = tuple(item.count("a dim") for item in entry.items("`transpose`"))
    if sorted(order) != list(range(len(order))):
        raise entry.wrong(f"`transpose` lists every dim once, not {list(order)}")
    return order


def _dtype(entry: Marked) -> str:
    name = entry.text("`dtype`")
    try:
        return dtype_of(name).name
    except FormatError as error:
        raise entry.wrong(str(error)) from error
