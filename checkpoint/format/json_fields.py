"""Reading and writing plain JSON that may be hostile: strict, and one clear error."""

import json
import re
from typing import Any

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.codec import Buffer
from checkpoint.format.texts import HALF_A_CHARACTER, MAX_TEXT
from checkpoint.format.tree import Json

_FLAGS = int(re.DOTALL | re.ASCII)  # a number: to join flags for each field takes longer than to match it
_MAX_VALUES = 1 << 24  # in one document: what is parsed takes up to some 60 bytes for each,
_MAX_CONTAINERS = 1 << 22  # and some 250 for each of these


def dump_json(value: Any, where: str) -> bytes:
    """Return plain JSON, ASCII only. Raises FormatError for what JSON cannot say."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not plain JSON: {error}") from error


def is_bounded(text: bytes) -> bool:
    """Whether JSON has so few values that a reader takes it; what texts have in them counts, too."""
    return text.count(b",") <= _MAX_VALUES and text.count(b"[") + text.count(b"{") <= _MAX_CONTAINERS


def parse_json(data: Buffer, where: str) -> Json:
    """Read JSON that may be hostile: it takes no more than some 2 GiB to read. Raises Corrupt."""
    text = bytes(data)
    if not is_bounded(text):
        raise Corrupt(f"{where} has more values in it than any sound JSON of ours")
    try:
        parsed: Json = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{where} is no sound JSON: {error}") from error
    return parsed


class Fields:
    """The fields of a JSON object: each is taken once and checked, and none may be left over."""

    def __init__(self, node: Json, where: str) -> None:
        if not isinstance(node, dict):
            raise Corrupt(f"{where} is not a JSON object")
        self._left = dict(node)
        self._where = where

    def text(self, name: str, pattern: str = rf".{{0,{MAX_TEXT}}}") -> str:
        """Take a string that matches the pattern as a whole."""
        value = self.json(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value, _FLAGS):
            raise self._wrong(name, value)
        if HALF_A_CHARACTER.search(value):
            raise self._wrong(name, value)
        return value

    def count(self, name: str, limit: int) -> int:
        """Take an integer from 0 to the limit."""
        value = self.json(name)
        if type(value) is not int or not 0 <= value <= limit:
            raise self._wrong(name, value)
        return value

    def items(self, name: str, limit: int) -> list[Json]:
        """Take a list of at most so many items."""
        value = self.json(name)
        if not isinstance(value, list) or len(value) > limit:
            raise self._wrong(name, value)
        return value

    def json(self, name: str) -> Json:
        """Take whatever is there."""
        if name not in self._left:
            raise Corrupt(f"{self._where} lacks the field {name!r}")
        return self._left.pop(name)

    def end(self) -> None:
        """Raise Corrupt if a field is left that nobody asked for."""
        if self._left:
            raise Corrupt(f"{self._where} has the unknown fields {sorted(self._left)[:5]}")

    def _wrong(self, name: str, value: Json) -> Corrupt:
        said = f"a {type(value).__name__}" if isinstance(value, list | dict) else ascii(value)[:80]
        return Corrupt(f"the field {name!r} of {self._where} cannot be {said}")


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")
