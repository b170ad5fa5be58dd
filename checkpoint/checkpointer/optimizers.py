"""An optimizer's state back from a checkpoint: by its parameters' names, in the layout these have now.

States are made here, filled, and only then given to the optimizer: torch's own loader would let the optimizer
step to make them, or cast them to the parameters' type.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from checkpoint.checkpointer.objects import optimizer_names
from checkpoint.engine.leaves import is_dtensor
from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import Mismatch
from checkpoint.format.manifest import TensorRecord
from checkpoint.format.tree import Json

Later = Callable[[], Any]


class Reading(Protocol):
    """What is asked of a restore under way."""

    names: dict[int, str]

    def tensor(self, live: torch.Tensor, node: Json, path: str) -> Later:
        """Fill a tensor where it is."""

    def value(self, node: Json, path: str) -> Later:
        """Read plain data and new tensors on the CPU."""

    def record(self, node: Json, path: str) -> TensorRecord:
        """Describe a stored tensor."""


def plan_optimizer(reading: Reading, optimizer: Optimizer, stored: Mapping[Any, Json], path: str) -> Later:
    """Ask for an optimizer's state and hyperparameters; return what puts them in.

    Raises Mismatch if its parameters are not those that it had, group by group.
    """
    names = optimizer_names(optimizer, reading.names, path)
    groups = _match_groups(names, stored["param_groups"], path)
    hyper = [reading.value(group, f"{path}/param_groups") for group in groups]
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    flat = [name for group in names for name in group]
    states = _names_to_states(stored["state"], flat, path)
    laters = {
        number: _parameter_state(reading, optimizer, parameters[number], states[name], f"{path}/state/{name}")
        for number, name in enumerate(flat)
        if name in states
    }

    def later() -> None:
        first, described = 0, []
        for read, called, group in zip(hyper, names, optimizer.param_groups, strict=True):
            numbers = list(range(first, first + len(called)))
            described.append({**_beside(read(), group), "params": numbers})
            first += len(called)
        filled = {number: one() for number, one in laters.items()}
        optimizer.load_state_dict({"state": filled, "param_groups": described})
        for number, values in filled.items():
            _keep_types(optimizer.state[parameters[number]], values)

    return later


def _match_groups(names: list[list[str]], node: Json, path: str) -> list[Json]:
    """Find the stored group of each group, by its parameters; they have to be divided the same way."""
    stored: dict[frozenset[Any], Json] = {}
    for group in node if isinstance(node, list) else []:
        if isinstance(group, dict) and isinstance(group.get("params"), list):
            stored[frozenset(map(str, group["params"]))] = group  # type: ignore[arg-type]  # a list, as checked
    for number, group_names in enumerate(names):
        if frozenset(group_names) not in stored:
            known = {name for group in stored for name in group}
            unknown = sorted(set(group_names) - known)
            raise Mismatch(
                f"{path}: the checkpoint has no group of the same parameters as group {number} here; "
                + (
                    f"it does not know {', '.join(unknown[:5])}"
                    if unknown
                    else "they are divided differently"
                )
            )
    if len(stored) != len(names):
        raise Mismatch(
            f"{path}: the checkpoint has {len(stored)} parameter groups, and {len(names)} are here"
        )
    return [stored[frozenset(group_names)] for group_names in names]


def _names_to_states(node: Json, flat: list[str], path: str) -> Mapping[str, Json]:
    if not isinstance(node, dict) or "$" in node:
        raise Mismatch(f"{path}: the checkpoint's state of the optimizer is not by parameter names")
    if unknown := sorted(set(node) - set(flat)):
        raise Mismatch(
            f"{path}: the checkpoint has states of parameters that are not here: {', '.join(unknown[:5])}"
        )
    return node


def _parameter_state(
    reading: Reading, optimizer: Optimizer, parameter: torch.Tensor, node: Json, path: str
) -> Later:
    """Ask for one parameter's state: into the tensors there are, or into new ones that lie as it does."""
    if not isinstance(node, dict) or "$" in node:
        return reading.value(node, path)
    current = optimizer.state.get(parameter, {})
    laters: dict[str, Later] = {}
    for key, item in node.items():
        match item:
            case {"$": "tensor"}:
                live = _place_for(reading.record(item, path), parameter, current.get(key))
                laters[key] = reading.tensor(live, item, f"{path}/{key}")
            case _:
                laters[key] = reading.value(item, f"{path}/{key}")
    return lambda: {key: later() for key, later in laters.items()}


def _place_for(record: TensorRecord, parameter: torch.Tensor, current: Any) -> torch.Tensor:
    dtype = torch_dtype(record.dtype)
    if isinstance(current, torch.Tensor) and (current.dtype, tuple(current.shape)) == (dtype, record.shape):
        return current
    if tuple(parameter.shape) == record.shape and record.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if record.shape and is_dtensor(parameter):  # a factored moment: whole on every rank
        module = sys.modules["torch.distributed.tensor"]
        local = torch.empty(record.shape, dtype=dtype, device=parameter.to_local().device)
        whole = [module.Replicate()] * parameter.device_mesh.ndim
        placed: torch.Tensor = module.DTensor.from_local(local, parameter.device_mesh, whole, run_check=False)
        return placed
    return torch.empty(record.shape, dtype=dtype)


def _beside(group: dict[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Put hyperparameters that are tensors where the optimizer has them now."""
    return {
        key: value.to(current[key].device)
        if isinstance(value, torch.Tensor) and isinstance(current.get(key), torch.Tensor)
        else value
        for key, value in group.items()
    }


def _keep_types(loaded: dict[str, Any], filled: Mapping[str, Any]) -> None:
    """Undo torch's cast of states to the type of their parameter: fp32 moments of bf16 weights stay fp32."""
    for key, value in filled.items():
        found = loaded.get(key)
        if (
            isinstance(value, torch.Tensor)
            and isinstance(found, torch.Tensor)
            and found.dtype != value.dtype
            and key != "step"
        ):
            loaded[key] = value.to(found.device)
