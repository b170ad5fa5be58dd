"""Templates of names: text with captures, which reads names and writes them.

`layers.{layer}.{part:q|k|v}.weight`: `{layer}` captures what has no dot and no slash, `{part:REGEX}` what the
regular expression matches. `{{` and `}}` are braces. A capture that occurs twice is the same both times.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpoint.errors import FormatError

SEGMENT = r"[^./]+"
_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Template:
    """A pattern of names. `patterns` has the regular expression of each capture that it knows."""

    text: str
    pieces: tuple[str, ...] = field(repr=False)  # literal, capture, literal, ..., literal
    patterns: Mapping[str, str] = field(repr=False, compare=False)
    regex: re.Pattern[str] = field(repr=False, compare=False)

    @property
    def captures(self) -> set[str]:
        """The names of the captures."""
        return set(self.pieces[1::2])

    def match(self, name: str) -> dict[str, str] | None:
        """Return what the captures are in a name; None if it is no name of this pattern."""
        found = self.regex.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, captures: Mapping[str, str | int]) -> str:
        """Write the name with these captures."""
        written = [
            piece if place % 2 == 0 else str(captures[piece]) for place, piece in enumerate(self.pieces)
        ]
        return "".join(written)


def parse_template(text: str, known: Mapping[str, str] | None = None) -> Template:
    """Read a template. `known` has patterns of captures that other templates of the rule have described.

    Raises FormatError.
    """
    pieces, patterns = [""], dict(known or {})
    place = 0
    while place < len(text):
        if text.startswith(("{{", "}}"), place):
            pieces[-1] += text[place]
            place += 2
        elif text[place] == "{":
            end = _closing(text, place)
            name, colon, pattern = text[place + 1 : end].partition(":")
            if not _NAME.fullmatch(name) or (colon and not pattern):
                raise FormatError(f"a capture is {{name}} or {{name:REGEX}}, not {text[place : end + 1]!r}")
            if colon or name not in patterns:
                patterns[name] = pattern if colon else SEGMENT
            pieces += [name, ""]
            place = end + 1
        elif text[place] == "}":
            raise FormatError(f"the template {text!r} closes a brace that it never opened")
        else:
            pieces[-1] += text[place]
            place += 1
    return Template(text, tuple(pieces), patterns, _regex(text, pieces, patterns))


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise FormatError(f"the template {text!r} opens a brace and does not close it")


def _regex(text: str, pieces: list[str], patterns: Mapping[str, str]) -> re.Pattern[str]:
    parts: list[str] = []
    seen: set[str] = set()
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            parts.append(re.escape(piece))
        elif piece in seen:
            parts.append(f"(?P={piece})")
        else:
            parts.append(f"(?P<{piece}>{patterns[piece]})")
            seen.add(piece)
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise FormatError(f"the template {text!r} has no sound regular expression: {error}") from error
