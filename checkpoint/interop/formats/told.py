"""Numbers that an optimizer keeps as plain data: readers find a tensor without dims in the place of each."""

from collections.abc import Mapping
from typing import Any


def told_numbers(extra: Mapping[str, Any]) -> dict[str, float]:
    """Return the plain numbers of parameters' states, by the names that readers give them as tensors."""
    optimizer = extra.get("optimizer")
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    return {
        f"optimizer.{kind}.{owner}": value
        for owner, entries in (state.items() if isinstance(state, dict) else ())
        for kind, value in (entries.items() if isinstance(entries, dict) else ())
        if type(value) in (int, float)
    }
