"""What a caller gives, as a setting or to work on: refused by name at once if it is of no such kind."""

import math
import operator
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, get_args

from checkpoint.store.contract import Store


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


def check_kind(name: str, value: Any, kind: type | UnionType) -> None:
    """Raise TypeError for what is not of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` is a {_named(kind)}, not {value!r}")


def check_several(name: str, values: Any, kind: type | UnionType) -> None:
    """Raise TypeError for what is no collection that can be gone through again, or not of a type alone."""
    if not isinstance(values, Collection) or isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"`{name}` are several, in a list, each a {_named(kind)}: not {values!r}")
    for value in values:
        check_kind(f"each of {name}", value, kind)


def check_step(step: Any) -> None:
    """Raise TypeError for a step that is no whole number."""
    try:
        operator.index(step)
    except TypeError:
        raise TypeError(f"`step` is a whole number, not {step!r}") from None


def check_store(name: str, value: Any) -> None:
    """Raise TypeError for what is no store: a URL is none yet."""
    if not isinstance(value, Store) or isinstance(value, type):
        raise TypeError(f"`{name}` is a Store, not {value!r}: `open_store` makes one of a URL")


def _named(kind: type | UnionType) -> str:
    kinds = get_args(kind) or (kind,)
    return " or ".join("None" if one is NoneType else one.__name__ for one in kinds)
