"""The inverse of naming: tensors by the contract's names and plain data, nested as torch programs do."""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.errors import Unsupported
from checkpoint.interop.formats.containers import CONTAINERS, Containers, containers_of
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.optimizer_dicts import Keys
from checkpoint.interop.formats.saving import Later
from checkpoint.interop.formats.spots import Step, put

# What of `extra` is for other formats, or says how to nest.
_BESIDE = {"files", "max_shard_bytes"}
_OWN = ("state", "param_groups")


def nest(contents: Contents, keys: Keys) -> dict[str, Any]:
    """Return the state with its model, optimizer and whatever else in their places; tensors are `Later`.

    Raises Unsupported for an optimizer's state whose parameter is in none of its groups.
    """
    extra = contents.about.extra
    told = containers_of(extra)
    places = told or Containers()
    optimizer = extra["optimizer"] if _is_optimizer(extra.get("optimizer")) else {}
    skipped = {*_BESIDE, *(["optimizer"] if optimizer else []), *([CONTAINERS] if told else [])}
    if told and not places.model and "files" in extra:
        skipped.add("config")  # of a folder whose weights are a file of their own
    model: dict[str, Later] = {}
    state: dict[str, dict[str, Any]] = {}
    inside: list[tuple[Sequence[Step], Later]] = []
    root = _rooted({key: item for key, item in extra.items() if key not in skipped}, places)
    for number, tensor in enumerate(contents.tensors):
        later = Later(number, tensor.dtype, tensor.shape)
        match tensor.name.split(".", 2):
            case ["optimizer", kind, owner]:
                state.setdefault(owner, {})[kind] = later
            case ["other", _, *_] if tensor.name in places.inside:
                inside.append((places.inside[tensor.name], later))
            case ["other", _, *_]:
                put(root, places.spots.get(tensor.name) or tensor.name.split(".")[1:], later)
            case _:
                model[tensor.name] = later
    put(root, places.model, {name: one for name, one in model.items() if name not in places.spots})
    for name in (one for one in model if one in places.spots):
        put(root, places.spots[name], model[name])
    if state or optimizer or inside:
        for owner, entries in optimizer.get("state", {}).items():
            state.setdefault(owner, {}).update(_copied(entries))
        made = {"state": state, **{key: _copied(item) for key, item in optimizer.items() if key not in _OWN}}
        for spot, later in inside:
            put(made, spot, later)
        groups = _groups(optimizer.get("param_groups"), model, made.pop("state"))
        make = {Keys.NUMBERS: _numbered, Keys.NAMES: _named, Keys.FLAT: _flat}[keys]
        put(root, places.optimizer, {**made, **make(state, groups)})
    return root


def _rooted(extra: Mapping[str, Any], places: Containers) -> dict[str, Any]:
    """Return the plain data that lie beside model and optimizer, in their places."""
    root: dict[str, Any] = {}
    for key, item in (*extra.items(), *places.kept.items()):
        put(root, places.placed.get(key) or [key], _copied(item))
    return root


def _is_optimizer(told: Any) -> bool:
    """Whether this is what is plain of one, and not what somebody calls so."""
    if not isinstance(told, dict) or told.keys().isdisjoint(_OWN):
        return False
    state, groups = told.get("state", {}), told.get("param_groups", [])
    entries = state.values() if isinstance(state, dict) else [None]
    return isinstance(groups, list) and all(isinstance(each, dict) for each in (*entries, *groups))


def leaves_of(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Return what dicts hold, and lists that hold dicts, lists of them, or tensors, with its place."""
    if isinstance(node, dict):
        return [leaf for key, item in node.items() for leaf in leaves_of(item, (*path, str(key)))]
    if isinstance(node, list) and any(isinstance(item, dict | Later) for item in node):
        return [leaf for number, item in enumerate(node) for leaf in leaves_of(item, (*path, number))]
    return [(path, node)]


def _copied(node: Any) -> Any:
    """Return dicts and lists that can be added to without changing those of the contents."""
    if isinstance(node, dict):
        return {key: _copied(item) for key, item in node.items()}
    return [_copied(item) for item in node] if isinstance(node, list) else node


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


def _flat(state: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    options = {
        f"param_groups.{name}.{option}": value
        for group in groups
        for name in group["params"]
        for option, value in group.items()
        if option != "params"
    }
    states = {
        f"state.{name}.{kind}": item for name, entries in state.items() for kind, item in entries.items()
    }
    return {**states, **options}
