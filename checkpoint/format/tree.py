"""Nested Python state <-> a skeleton of plain JSON and tensors by name. No pickle; leaves are opaque.

JSON has fewer types than Python. What it lacks is an object with the key "$" that names the type: a reference
to a tensor, a tuple, a dict whose keys are not plain strings, bytes, an int beyond 2^53, a float that is not
finite, a complex number.
"""

import base64
import binascii
import math
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from checkpoint.errors import Corrupt, FormatError, Unsupported
from checkpoint.format.texts import check_text

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Leaf = TypeVar("Leaf")

MAX_DEPTH = 64
_TAG = "$"
_ROOT = "value"
_MAX_EXACT_INT = 2**53
_SCALARS = frozenset({bool, int, float, str, type(None)})  # all but containers, in what JSON gives


@dataclass(frozen=True, slots=True)
class Flat(Generic[Leaf]):
    """A state taken apart. A leaf that the state holds twice is here once; the skeleton names it twice."""

    skeleton: Json
    leaves: dict[str, Leaf]


def flatten(state: object, is_leaf: Callable[[Any], bool], key: Callable[[Any], Hashable] = id) -> Flat[Any]:
    """Take a nested state apart into its skeleton and its leaves, named by path ("model/layer.0.weight").

    `is_leaf` tells what is a leaf; two leaves with the same `key` are one (tied weights).

    Raises FormatError naming the path of a value that cannot be stored, or of one nested deeper than 64.
    """
    walk = _Flattening(is_leaf, key)
    skeleton = walk.skeleton(state, ())
    return Flat(skeleton, walk.leaves)


def unflatten(skeleton: Json, leaves: Mapping[str, Leaf]) -> Any:
    """Put a state together again; a leaf named twice is the same object twice.

    Raises Corrupt for a skeleton that `flatten` would not make, or if a leaf is missing.
    """
    return _unflatten(skeleton, leaves, 0)


def leaf_names(skeleton: Json) -> Iterator[str]:
    """Yield the name of every leaf that the skeleton refers to, as often as it does."""
    stack: list[Json] = [skeleton]
    while stack:
        match stack.pop():
            case {"$": "tensor", "name": str(name)}:
                yield name
            case dict() as node:
                stack.extend(reversed(node.values()))
            case list() as items if not _SCALARS.issuperset(map(type, items)):
                stack.extend(reversed(items))


def is_bulk(items: Collection[Any]) -> bool:
    """Whether a list or tuple holds only ints, only floats or only text, each as JSON has it.

    It is looked at as a whole: a sampler's state may be a list of a million numbers.
    """
    kinds = set(map(type, items))
    if kinds == {int}:
        return all(-_MAX_EXACT_INT <= end <= _MAX_EXACT_INT for end in (min(items), max(items)))
    if kinds == {float}:
        return all(map(math.isfinite, items))
    return kinds == {str}


class _Flattening:
    """One walk over a state: the leaves found so far, and the names they got."""

    def __init__(self, is_leaf: Callable[[Any], bool], key: Callable[[Any], Hashable]) -> None:
        self._is_leaf = is_leaf
        self._key = key
        self._names: dict[Hashable, str] = {}
        self.leaves: dict[str, Any] = {}

    def skeleton(self, value: Any, path: tuple[str, ...]) -> Json:
        if len(path) > MAX_DEPTH:
            raise FormatError(
                f"{'/'.join(path[:4])}/... is nested deeper than {MAX_DEPTH} levels: break the cycle in it"
            )
        if self._is_leaf(value):
            return {_TAG: "tensor", "name": self._name(value, path)}
        if type(value) in (dict, OrderedDict):
            return self._dict(value, path)
        if type(value) in (list, tuple):
            if len(path) < MAX_DEPTH and is_bulk(value):
                return list(value) if type(value) is list else {_TAG: "tuple", "items": list(value)}
            items = [self.skeleton(item, (*path, str(i))) for i, item in enumerate(value)]
            return items if type(value) is list else {_TAG: "tuple", "items": items}
        return _scalar(value, path)

    def _dict(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Json:
        if _TAG not in value and all(type(name) is str for name in value):
            return {name: self.skeleton(item, (*path, name)) for name, item in value.items()}
        return {
            _TAG: "dict",
            "items": [
                [self._dict_key(name, path), self.skeleton(item, (*path, str(name)))]
                for name, item in value.items()
            ],
        }

    def _dict_key(self, name: Any, path: tuple[str, ...]) -> Json:
        if type(name) is tuple:
            return {_TAG: "tuple", "items": [self._dict_key(part, (*path, "(key)")) for part in name]}
        return _scalar(name, (*path, "(key)"))

    def _name(self, leaf: Any, path: tuple[str, ...]) -> str:
        identity = self._key(leaf)
        if identity not in self._names:
            wanted = name = check_text("/".join(path), "the name of a tensor") or _ROOT
            number = 2
            while name in self.leaves:  # {"a/b": x, "a": {"b": y}}
                name, number = f"{wanted}~{number}", number + 1
            self._names[identity] = name
            self.leaves[name] = leaf
        return self._names[identity]


def _scalar(value: Any, path: tuple[str, ...]) -> Json:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value  # type: ignore[no-any-return]  # checked by its exact type
    if kind is int:
        return value if abs(value) <= _MAX_EXACT_INT else {_TAG: "int", "hex": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if kind is complex:
        return {_TAG: "complex", "parts": [_scalar(value.real, path), _scalar(value.imag, path)]}
    if kind is bytes:
        return {_TAG: "bytes", "base64": base64.b64encode(value).decode("ascii")}
    raise Unsupported(
        f"{'/'.join(path) or 'the state'} is a {kind.__module__}.{kind.__qualname__}, "
        "which a checkpoint cannot hold: make it a tensor, a plain number, str, bytes, list, tuple or dict"
    )


def _unflatten(node: Json, leaves: Mapping[str, Any], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:  # a tagged value takes two levels of JSON
        raise Corrupt(f"the skeleton is nested deeper than {MAX_DEPTH}")
    match node:
        case dict():
            if _TAG in node:
                return _untag(node, leaves, depth)
            return {name: _unflatten(item, leaves, depth + 1) for name, item in node.items()}
        case list() if _SCALARS.issuperset(map(type, node)):
            return list(node)
        case list():
            return [_unflatten(item, leaves, depth + 1) for item in node]
        case _:
            return node


def _untag(node: dict[str, Json], leaves: Mapping[str, Any], depth: int) -> Any:
    try:
        match node:
            case {"$": "tensor", "name": str(name), **rest} if not rest:
                return leaves[name]
            case {"$": "tuple", "items": list(items), **rest} if not rest:
                return tuple(_unflatten(item, leaves, depth + 1) for item in items)
            case {"$": "dict", "items": list(items), **rest} if not rest:
                pairs = [_unflatten(item, leaves, depth + 1) for item in items]
                return dict(pairs)
            case {"$": "int", "hex": str(digits), **rest} if not rest:
                return int(digits, 16)
            case {"$": "float", "value": "inf" | "-inf" | "nan" as text, **rest} if not rest:
                return float(text)
            case {"$": "complex", "parts": [real, imaginary], **rest} if not rest:
                return complex(_unflatten(real, leaves, depth + 1), _unflatten(imaginary, leaves, depth + 1))
            case {"$": "bytes", "base64": str(text), **rest} if not rest:
                return base64.b64decode(text, validate=True)
    except KeyError as error:
        raise Corrupt(
            f"the skeleton refers to the tensor {error}, which the checkpoint does not hold"
        ) from None
    except (ValueError, TypeError, binascii.Error) as error:
        raise Corrupt(
            f"the skeleton holds a value that means nothing: {reprlib.repr(node)} ({error})"
        ) from error
    raise Corrupt(f"the skeleton holds a value of no known kind: {reprlib.repr(node)}")
