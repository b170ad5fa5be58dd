"""Numbers that a caller gives as a setting: refused by name at once if they are none, or out of bounds."""

import math
from typing import Any


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise TypeError for what is no whole number, ValueError for one out of bounds."""
    bounds = f"a whole number of {least} or more" if most is None else f"a whole number, {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {bounds}, not {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"`{name}` is {bounds}, not {value}")


def check_seconds(name: str, value: Any) -> None:
    """Raise TypeError for what is no number, ValueError for less than none, and for no finite one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` is a number of seconds, not {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` is a number of seconds, 0 or more, not {value}")


def check_one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError for what is none of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` is {' or '.join(map(repr, choices))}, not {value!r}")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError for what is not of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` is a {kind.__name__}, not {value!r}")
