"""What torch's optimizers are in a state: which of its dicts are some, and how those call parameters."""

from enum import Enum
from typing import Any

from checkpoint.interop.formats.inert import MAX_DEPTH, Dict
from checkpoint.interop.formats.spots import Step, steps_into


class Keys(Enum):
    """What an optimizer's state_dict calls its parameters."""

    NUMBERS = "numbers"  # as an optimizer itself does
    NAMES = "names"  # as torch.distributed.checkpoint.state_dict does
    FLAT = "flat"  # as that does with flatten_optimizer_state_dict: names within the keys


def keys_of(node: dict[str, Any]) -> Keys:
    """Return how an optimizer calls its parameters."""
    if not node.keys() >= {"state", "param_groups"}:
        return Keys.FLAT
    groups = node["param_groups"]
    numbers = (
        [type(each) is int for group in groups for each in params_of(group)]
        if isinstance(groups, list)
        else []
    )
    return Keys.NUMBERS if any(numbers) else Keys.NAMES


def params_of(group: Any) -> list[Any]:
    found = group.get("params", []) if isinstance(group, dict) else []
    return found if isinstance(found, list) else []


def is_optimizer(node: Any) -> bool:
    """Tell whether this is what an optimizer's state_dict is, nested or with dotted keys."""
    if not isinstance(node, dict) or not node:
        return False
    if node.keys() >= {"state", "param_groups"}:
        return True
    if not all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in node):
        return False
    return any(key.startswith("param_groups.") for key in node)  # a module may be called "state"


def optimizers_of(root: dict[Any, Any]) -> list[tuple[list[Step], Any]]:
    """Return the optimizers of a level, and where they are: by themselves, or in a list."""
    found: list[tuple[list[Step], Any]] = []
    for step, node in steps_into(root):
        if is_optimizer(node):
            found.append(([step], node))
        elif isinstance(node, list | tuple) and node and all(map(is_optimizer, node)):
            found += [([step, number], each) for number, each in enumerate(node)]
    return found


def numbered(node: Any, depth: int = 0) -> Any:
    """Return a state in which the states of numbered parameters are found by numbers.

    A torch distributed checkpoint has no other keys than texts, by which a program would take no state.
    """
    if depth > MAX_DEPTH:
        return node
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        return [numbered(item, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: numbered(item, depth + 1) for key, item in node.items()}
    state = made.get("state")
    if is_optimizer(made) and isinstance(state, dict) and keys_of(made) is Keys.NUMBERS:
        made["state"] = {int(key) if str(key).isdecimal() else key: item for key, item in state.items()}
    return made


def optimizers_within(node: dict[Any, Any], spot: tuple[Step, ...] = ()) -> list[list[Step]]:
    """Return where optimizers are at any level of nested dicts."""
    found: list[list[Step]] = []
    for step, item in steps_into(node):
        if is_optimizer(item):
            found.append([*spot, step])
        elif isinstance(item, dict) and len(spot) < MAX_DEPTH:
            found += optimizers_within(item, (*spot, step))
    return found


def unflattened(node: dict[str, Any]) -> dict[str, Any]:
    """Nest an optimizer's state whose keys are "state.PARAM.STATE" and "param_groups.PARAM.OPTION"."""
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, item in node.items():
        kind, _, rest = key.partition(".")
        owner, _, name = rest.rpartition(".")
        (state if kind == "state" else options).setdefault(owner, Dict())[name] = item
    groups: list[dict[str, Any]] = []
    for owner, chosen in options.items():
        same = next((group for group in groups if {**group, "params": 0} == {**chosen, "params": 0}), None)
        if same is None:
            same = {**chosen, "params": []}
            groups.append(same)
        same["params"].append(owner)
    return {"state": state, "param_groups": groups}
