"""Containers in a job's state: taken as plain ones with the names of their kinds, and made again of these.

A name is data: it stands for a well-known kind, for what the one that takes it has there itself before its
first step, or for a namedtuple in the module of its optimizer or schedule. Nothing else is ever looked up.
"""

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoint import Mismatch, like, to_plain
from elastic.errors import JobRejected

Path = tuple[Any, ...]
"""Keys and indices from the root of a state."""

Kinds = Mapping[Path, str]
"""The names of the kinds of a state's containers that are not plain dicts, lists and tuples."""

_PLAIN = (dict, list, tuple)
_LEAVES = frozenset({bool, int, float, complex, str, bytes, type(None)})
_FACTORIES = (None, bool, int, float, complex, str, bytes, list, tuple, dict, Counter, OrderedDict)


@dataclass(frozen=True, slots=True)
class Newcomer:
    """What a worker has that has made no step: `own`, a state's parts; `names`, those of the classes that the
    parts are of, and the `modules` of these.
    """

    own: Mapping[str, Any]
    names: Mapping[str, str]
    modules: frozenset[str]

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state's parts with plain containers, and "kinds". Its tensors are the live ones.

        Raises JobRejected, naming it, for what such a worker could not come to exactly.
        """
        plain = to_plain(state, "the state")
        kinds = dict(_kinds(state, ()))
        made = self._again(plain, (), kinds, self.own) if kinds else plain
        for path, value in _lost(state, made, ()):
            raise JobRejected(
                "the job's state can neither be given to other workers nor saved: "
                f"{_place(path)} is a {_shown(value)} ({self.names.get(path[0], '')}'s), which could not "
                "come to them as it is here: make it a tensor, number, str, bytes, list, tuple, dict, "
                "Counter, OrderedDict, defaultdict of a builtin type, or a namedtuple of the same module"
            )
        return {**plain, "kinds": kinds}

    def make(self, plain: Mapping[str, Any], kinds: Kinds | None) -> dict[str, Any]:
        """Return what was taken with its containers as they were; without `kinds`, which older checkpoints
        lack, as this worker's own ones are.

        Raises Mismatch, naming it, for a kind that this worker does not know.
        """
        if kinds is None:
            return {key: like(self.own.get(key), value) for key, value in plain.items()}
        made: dict[str, Any] = self._again(plain, (), kinds, self.own)
        found = dict(_kinds(made, ()))
        for path, kind in kinds.items():
            if path[0] in plain and found.get(path) != kind:
                raise Mismatch(
                    f"the state's {_place(path)} was a {kind.replace(':', '.')}, which the job does not have "
                    "here: resume with the job that wrote it"
                )
        return made

    def _again(self, value: Any, path: Path, kinds: Kinds, own: Any) -> Any:
        """Return the same with the kinds that are known, and the others as they come."""
        if type(value) not in _PLAIN:
            return value
        items: Any = value.copy() if type(value) is dict else list(value)
        for key, each in _entries(value):
            items[key] = self._again(each, (*path, key), kinds, _inside(own, key))
        if type(value) is tuple:
            items = tuple(items)
        kind = kinds.get(path)
        return items if kind is None else self._maker(kind, own)(items)

    def _maker(self, kind: str, own: Any) -> Callable[[Any], Any]:
        """Return what makes a container of a kind of plain ones."""
        if isinstance(own, _PLAIN) and _name(own) == kind:
            return partial(as_one_like, own)
        if kind in _KNOWN:
            return _KNOWN[kind]
        for module in self.modules:
            found: Any = sys.modules.get(module)
            for part in kind.partition(":")[2].split("."):
                found = getattr(found, "__dict__", {}).get(part)
            is_named = isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_make")
            if is_named and _title(found) == kind:
                return found._make  # type: ignore[no-any-return]  # a namedtuple's, as was seen
        return lambda items: items


def newcomer_of(state: Mapping[str, Any], objects: Mapping[str, object]) -> Newcomer:
    """Note what a worker has that has made no step: its state's parts, and the objects that they are of."""
    modules = {kind.__module__ for each in objects.values() for kind in type(each).__mro__}
    names = {part: type(each).__name__ for part, each in objects.items()}
    return Newcomer(_bare(state), names, frozenset(modules - {"builtins"}))


def _bare(value: Any) -> Any:
    """Return the same in containers of its own, which nobody changes later."""
    if isinstance(value, dict):
        return as_one_like(value, {key: _bare(each) for key, each in value.items()})
    return as_one_like(value, [_bare(each) for each in value]) if isinstance(value, (list, tuple)) else value


def as_one_like(own: Any, items: Any) -> Any:
    """Return a container like another one, with other items; a plain one if it cannot be that."""
    if type(own) is type(items):
        return items
    if isinstance(own, dict):
        made = copy(own)  # with what its constructor was given: a default, a maximum
        made.clear()
        made.update(items)
        return made
    make = getattr(type(own), "_make", type(own))  # a namedtuple's constructor takes no iterable
    try:
        return make(items)
    except TypeError:
        return items


def _inside(own: Any, key: Any) -> Any:
    if isinstance(own, dict):
        return own.get(key)
    return own[key] if isinstance(own, (list, tuple)) and key in range(len(own)) else None


def _title(kind: object) -> str:
    return f"{getattr(kind, '__module__', '')}:{getattr(kind, '__qualname__', kind)}"


def _name(container: Any) -> str:
    """Name a container's kind."""
    kind = _title(type(container))
    return f"{kind}({_title(container.default_factory)})" if type(container) is defaultdict else kind


def _shown(value: Any) -> str:
    return (_name(value) if isinstance(value, _PLAIN) else _title(type(value))).replace(":", ".")


_KNOWN: Mapping[str, Callable[[Any], Any]] = {
    **{_title(kind): kind for kind in (Counter, OrderedDict, torch.Size)},
    **{_name(defaultdict(each)): partial(defaultdict, each) for each in _FACTORIES},
}


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield keys and what may have more inside; a million numbers in a list are looked at as a whole."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)) and not _LEAVES.issuperset(map(type, value)):
        yield from enumerate(value)


def _place(path: Path) -> str:
    return "/".join(map(str, path))


def _kinds(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Yield where a state has containers that are not plain, and their kinds."""
    if isinstance(value, _PLAIN) and type(value) not in _PLAIN:
        yield path, _name(value)
    for key, each in _entries(value):
        yield from _kinds(each, (*path, key))


def _lost(live: Any, made: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield what of a state is not the same in what was made of it."""
    if not isinstance(live, _PLAIN):
        if not isinstance(live, Tensor) and type(live) not in _LEAVES:
            yield path, live
        return
    if type(live) is not type(made) or len(live) != len(made) or not _is_alike(live, made):
        yield path, live
        return
    for (key, one), (_, other) in zip(_entries(live), _entries(made), strict=True):
        if not _is_plain_key(key):
            yield (*path, "(key)"), key
        yield from _lost(one, other, (*path, key))


def _is_alike(live: Any, made: Any) -> bool:
    """Whether two containers of one type have the same keys, attributes and defaults."""
    one, other = getattr(live, "__dict__", {}), getattr(made, "__dict__", {})
    has_attributes = one.keys() == other.keys() and all(other[key] is each for key, each in one.items())
    has_keys = not isinstance(live, dict) or list(live) == list(made)
    return has_attributes and has_keys and _name(live) == _name(made)


def _is_plain_key(key: Any) -> bool:
    return all(map(_is_plain_key, key)) if type(key) is tuple else type(key) in _LEAVES
