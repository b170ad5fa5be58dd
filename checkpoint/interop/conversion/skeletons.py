"""The state around the tensors: what is left of it when some are left out. Pure."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from checkpoint.errors import FormatError, Misuse
from checkpoint.format.tree import Json

_GONE = object()
_SCALARS = ("int", "float", "complex", "bytes")

Keeps = Callable[[str], bool]


def matches(pattern: str | None) -> Keeps:
    """Return what tells whether a name fits a glob; without one, all do."""
    return lambda name: pattern is None or fnmatchcase(name, pattern)


def nothing_fits(pattern: str | None, step: int, where: str) -> FormatError:
    """Return the error for a checkpoint of which nothing is left to convert."""
    if pattern is None:
        return FormatError(f"step {step} of {where} holds no tensor")
    return Misuse(f"{pattern!r} fits nothing of step {step} of {where}: `holdfast inspect` lists its names")


def select(skeleton: Json, keeps: Keeps) -> Json:
    """Return a skeleton of the tensors and plain values whose names or paths are kept.

    A dict loses the key of what is left out, a list or tuple has None in its place.
    """
    kept = _select(skeleton, (), keeps)
    return None if kept is _GONE else kept  # type: ignore[return-value]  # plain JSON otherwise


def _select(node: Json, path: tuple[str, ...], keeps: Keeps) -> object:
    match node:
        case {"$": "tensor", "name": str(name)}:
            return node if keeps(name) else _GONE
        case {"$": "tuple", "items": list(items)}:
            kept = _items(items, path, keeps)
            return kept if kept is _GONE else {"$": "tuple", "items": kept}
        case {"$": "dict", "items": list(items)}:
            pairs = [item for item in items if isinstance(item, list) and len(item) == 2]
            found = [(key, _select(value, (*path, str(key)), keeps)) for key, value in pairs]
            left = [[key, value] for key, value in found if value is not _GONE]
            return {"$": "dict", "items": left} if left or not items else _GONE
        case {"$": str(kind)} if kind in _SCALARS:
            return node if keeps("/".join(path)) else _GONE
        case dict():
            chosen = {name: _select(value, (*path, name), keeps) for name, value in node.items()}
            some = {name: value for name, value in chosen.items() if value is not _GONE}
            return some if some or (not node and keeps("/".join(path))) else _GONE
        case list():
            return _items(node, path, keeps)
        case _:
            return node if keeps("/".join(path)) else _GONE


def _items(items: list[Json], path: tuple[str, ...], keeps: Keeps) -> object:
    kept = [_select(item, (*path, str(number)), keeps) for number, item in enumerate(items)]
    if all(one is _GONE for one in kept) and (items or not keeps("/".join(path))):
        return _GONE
    return [None if one is _GONE else one for one in kept]
