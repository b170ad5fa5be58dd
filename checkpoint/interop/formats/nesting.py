"""The inverse of naming: tensors by the contract's names and plain data, nested as torch programs do."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from checkpoint.errors import Unsupported
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.saving import Later

# What of `extra` is for other formats, or says how to nest.
_NOT_STATE = {"containers", "optimizer", "files", "max_shard_bytes"}
_DEFAULTS: Mapping[str, Sequence[str]] = {"model": ("model",), "optimizer": ("optimizer",)}


class Keys(Enum):
    """What an optimizer's state_dict calls its parameters."""

    NUMBERS = "numbers"  # as an optimizer itself does
    NAMES = "names"  # as torch.distributed.checkpoint.state_dict does


def nest(contents: Contents, keys: Keys) -> dict[str, Any]:
    """Return the state with its model, optimizer and whatever else in their places; tensors are `Later`.

    Raises Unsupported for an optimizer's state whose parameter is in none of its groups.
    """
    extra = contents.about.extra
    model: dict[str, Later] = {}
    state: dict[str, dict[str, Any]] = {}
    root = {key: _copied(item) for key, item in extra.items() if key not in _NOT_STATE}
    for number, tensor in enumerate(contents.tensors):
        later = Later(number, tensor.dtype, tensor.shape)
        match tensor.name.split(".", 2):
            case ["optimizer", kind, owner]:
                state.setdefault(owner, {})[kind] = later
            case ["other", *path]:
                _put(root, ".".join(path).split("."), later)
            case _:
                model[tensor.name] = later
    places = {**_DEFAULTS, **extra.get("containers", {})}
    _put(root, list(places["model"]), model)
    optimizer = extra.get("optimizer", {})
    if state or optimizer:
        for owner, entries in optimizer.get("state", {}).items():
            state.setdefault(owner, {}).update(entries)
        groups = _groups(optimizer.get("param_groups"), model, state)
        make = {Keys.NUMBERS: _numbered, Keys.NAMES: _named}[keys]
        beside = {key: item for key, item in optimizer.items() if key not in ("state", "param_groups")}
        _put(root, list(places["optimizer"]), {**beside, **make(state, groups)})
    return root


def leaves_of(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Return what dicts hold, and lists that hold dicts, lists of them, or tensors, with its place."""
    if isinstance(node, dict):
        return [leaf for key, item in node.items() for leaf in leaves_of(item, (*path, str(key)))]
    if isinstance(node, list) and any(isinstance(item, dict | Later) for item in node):
        return [leaf for number, item in enumerate(node) for leaf in leaves_of(item, (*path, number))]
    return [(path, node)]


def _copied(node: Any) -> Any:
    """Return dicts that can be added to without changing those of the contents."""
    return {key: _copied(item) for key, item in node.items()} if isinstance(node, dict) else node


def _groups(
    given: Sequence[Mapping[str, Any]] | None, model: Mapping[str, Any], state: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the parameter groups; where nothing tells of any, one of all parameters that have a state."""
    if not given:
        return [{"params": [name for name in model if name in state]}] if state.keys() <= model.keys() else []
    groups = [dict(group) for group in given]
    grouped = {name for group in groups for name in group.get("params", [])}
    strays = sorted(state.keys() - grouped)
    if strays:
        raise Unsupported(f"the optimizer's states of {strays[:3]} are of parameters in none of its groups")
    return groups


def _numbered(state: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    numbered = [
        {**group, "params": [numbers[name] for name in group["params"]], "param_names": list(group["params"])}
        for group in groups
    ]
    by_number = {numbers[name]: entries for name, entries in state.items()}
    return {"state": dict(sorted(by_number.items())), "param_groups": numbered}


def _named(state: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"state": dict(state), "param_groups": list(groups)}


def _put(root: dict[str, Any], path: Sequence[str], item: Any) -> None:
    """Put something into its place; what a dict holds goes beside what is there."""
    *above, last = path or [""]
    entries = item if isinstance(item, dict) else {last: item}
    node = root
    for key in path if isinstance(item, dict) else above:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise Unsupported(f"nothing can be put into {key!r}: it is no container")
    for key, value in entries.items():
        if key in node:
            raise Unsupported(f"there are two things at {'.'.join([*path, str(key)])}")
        node[key] = value
