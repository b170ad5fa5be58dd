"""Containers on their way out and back: stored as dicts, lists and tuples, returned as what is there."""

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from checkpoint.errors import FormatError
from checkpoint.format.tree import MAX_DEPTH, is_bulk


def check_depth(path: str, depth: int) -> None:
    """Raise FormatError for what is nested deeper than the format allows, as what contains itself is."""
    if depth > MAX_DEPTH:
        raise FormatError(
            f"{path[:80]}... is nested deeper than {MAX_DEPTH} levels: does it contain itself? "
            "Leave that out of the state"
        )


def to_plain(value: Any, path: str, depth: int = 0) -> Any:
    """Return nested containers as plain dicts, lists and tuples; everything else as it is."""
    check_depth(path, depth)
    if isinstance(value, dict):
        return {key: to_plain(item, f"{path}/{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if is_bulk(value):
            return list(value) if isinstance(value, list) else tuple(value)
        items = [to_plain(item, f"{path}/{number}", depth + 1) for number, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def like(live: Any, value: Any) -> Any:
    """Return a restored value with its containers as the live one has them: a Counter, a namedtuple."""
    if isinstance(live, dict) and type(value) is dict:
        return _mapping_like(live, {key: _item_like(live, key, item) for key, item in value.items()})
    for kind in (list, tuple):
        if isinstance(live, kind) and type(value) is kind:
            if is_bulk(value) or len(live) != len(value):
                return rebuilt(live, value) if type(live) is not kind else value
            return rebuilt(live, [like(one, item) for one, item in zip(live, value, strict=True)])
    return value


def rebuilt(live: Any, items: Iterable[Any]) -> Any:
    """Return a sequence of the type of a live one, with other items; as a plain one if it cannot be that."""
    make = getattr(type(live), "_make", type(live))  # a namedtuple's constructor takes no iterable
    items = list(items)
    try:
        return make(items)
    except TypeError:
        return items if isinstance(live, list) else tuple(items)


def _item_like(live: Mapping[Any, Any], key: Any, item: Any) -> Any:
    return like(live[key], item) if key in live else item


def _mapping_like(live: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    if type(live) is dict:
        return items
    made = copy(live)  # with what its constructor was given: a default, a maximum
    made.clear()
    made.update(items)
    return made
