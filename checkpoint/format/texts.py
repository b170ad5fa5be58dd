"""Texts that a manifest can hold: those that a reader takes back are all that a writer may give it."""

import re

from checkpoint.errors import FormatError

MAX_TEXT = 4096
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


def check_text(text: str, what: str) -> str:
    """Return a name that a manifest can hold. Raises FormatError."""
    if len(text) > MAX_TEXT:
        raise FormatError(f"{what} has {len(text)} characters, and {MAX_TEXT} are the most: {text[:40]!r}...")
    if not text.isascii() and HALF_A_CHARACTER.search(text):
        raise FormatError(f"{what} {text[:80]!r} has half a character in it (a lone surrogate): rename it")
    return text
