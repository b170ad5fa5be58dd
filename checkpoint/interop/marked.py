"""YAML with places: every value knows its line, so that an error can say where. Nothing is constructed."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from checkpoint.errors import FormatError
from checkpoint.interop.expression import Expression, names_in, parse_expression
from checkpoint.interop.template import Template, parse_template

MAX_DOCUMENT_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Marked:
    """A YAML value and where it stands."""

    document: str
    node: yaml.Node

    @property
    def line(self) -> int:
        """Its line, from 1."""
        return int(self.node.start_mark.line) + 1

    def wrong(self, message: str) -> FormatError:
        """Return the error that says what is wrong here."""
        return FormatError(f"{self.document}, line {self.line}: {message}")

    def fields(self, what: str) -> "MarkedFields":
        """Return the entries of a mapping. Raises FormatError if it is none, or has a key twice."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(f"{what} is a mapping")
        entries: dict[str, Marked] = {}
        for key, value in self.node.value:
            name = Marked(self.document, key).text("a key")
            if name in entries:
                raise Marked(self.document, key).wrong(f"the key {name!r} is here twice")
            entries[name] = Marked(self.document, value)
        return MarkedFields(self, what, entries)

    def items(self, what: str) -> "list[Marked]":
        """Return the items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong(f"{what} is a list")
        return [Marked(self.document, item) for item in self.node.value]

    def text(self, what: str) -> str:
        """Return a scalar as it is written."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.wrong(f"{what} is a single word or number")
        return str(self.node.value)

    def count(self, what: str) -> int:
        """Return a small number from zero on."""
        text = self.text(what)
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise self.wrong(f"{what} is a number from 0 on, not {text!r}")
        return int(text)

    def flag(self, what: str) -> bool:
        """Return true or false."""
        text = self.text(what)
        if text not in ("true", "false"):
            raise self.wrong(f"{what} is true or false, not {text!r}")
        return text == "true"

    def expression(self, what: str, names: set[str]) -> Expression:
        """Return an expression that uses only these names."""
        try:
            expression = parse_expression(self.text(what))
        except FormatError as error:
            raise self.wrong(f"{what}: {error}") from error
        unknown = names_in(expression) - names
        if unknown:
            raise self.wrong(f"{what} uses {sorted(unknown)}, which are no sizes of this document")
        return expression

    def template(self, what: str, known: Mapping[str, str] | None = None) -> Template:
        """Return a pattern of names."""
        try:
            return parse_template(self.text(what), known)
        except FormatError as error:
            raise self.wrong(f"{what}: {error}") from error

    @property
    def is_null(self) -> bool:
        """Whether nothing is written here."""
        return isinstance(self.node, yaml.ScalarNode) and self.node.tag == "tag:yaml.org,2002:null"

    @property
    def is_mapping(self) -> bool:
        """Whether this is a mapping."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether this is a list."""
        return isinstance(self.node, yaml.SequenceNode)


class MarkedFields:
    """The entries of a mapping, each taken once; what is left over at the end is an error."""

    def __init__(self, owner: Marked, what: str, entries: dict[str, Marked]) -> None:
        self._owner = owner
        self._what = what
        self._left = entries
        self._asked: set[str] = set()

    def take(self, name: str) -> Marked:
        """Return the entry of a name. Raises FormatError if it is missing."""
        value = self.find(name)
        if value is None:
            near = difflib.get_close_matches(name, self._left, 1)
            hint = f": is {near[0]!r} meant to be it?" if near else ""
            raise self._owner.wrong(f"{self._what} lacks {name!r}{hint}")
        return value

    def find(self, name: str) -> Marked | None:
        """Return the entry of a name, or None."""
        self._asked.add(name)
        return self._left.pop(name, None)

    def rest(self) -> dict[str, Marked]:
        """Return all entries that are left, whatever their names."""
        left, self._left = self._left, {}
        return left

    def end(self) -> None:
        """Raise FormatError if an entry is left that nobody asked for."""
        for name, value in self._left.items():
            near = difflib.get_close_matches(name, self._asked, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {sorted(self._asked)}"
            if "(" in name or ")" in name:
                hint = "within { } put quotes around an expression that has a comma"
            raise value.wrong(f"{self._what} has no {name!r}: {hint}")


def read_yaml(text: str, document: str) -> Marked:
    """Read one YAML document. Raises FormatError, also for anchors, which rules do not need."""
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        raise FormatError(f"{document} is too long for a rule document: {len(text)} characters")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise FormatError(f"{document} uses YAML aliases, which a rule document may not")
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise FormatError(f"{document} is no YAML: {error}") from error
    if node is None:
        raise FormatError(f"{document} is empty")
    return Marked(document, node)
