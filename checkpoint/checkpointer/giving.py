"""From what a training loop has to what a saver takes: modules, optimizers and the like as plain trees."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from checkpoint.checkpointer.objects import (
    Kind,
    class_of,
    kind_of,
    module_state,
    optimizer_names,
    parameter_names,
    state_of_rank,
)
from checkpoint.engine.likeness import check_depth, to_plain
from checkpoint.engine.per_rank import PerRank
from checkpoint.errors import Unsupported
from checkpoint.format.tree import is_bulk

_MAX_CLONED_BYTES = 1 << 20


def to_tree(state: Any) -> Any:
    """Return a state as nested plain data, tensors and PerRank values.

    An optimizer's state goes by the names of its parameters, as they are in the modules beside it.
    """
    return _node(state, "", parameter_names(state))


def _node(value: Any, path: str, names: Mapping[int, str], depth: int = 0) -> Any:
    check_depth(path, depth)
    match kind_of(value):
        case Kind.DICT:
            return {
                key: _node(item, f"{path}/{key}" if path else str(key), names, depth + 1)
                for key, item in value.items()
            }
        case Kind.LIST | Kind.TUPLE as kind:
            if is_bulk(value):
                return to_plain(value, path)
            items = [_node(item, f"{path}/{at}", names, depth + 1) for at, item in enumerate(value)]
            return items if kind is Kind.LIST else tuple(items)
        case Kind.MODULE:
            return {name: _held_still(tensor) for name, tensor in module_state(value, path).items()}
        case Kind.OPTIMIZER:
            return _optimizer(value, path or "the state", names)
        case Kind.PER_RANK if isinstance(value, PerRank):
            return PerRank(_node(value.value, path, names, depth + 1), value.max_bytes)
        case Kind.PER_RANK:
            return PerRank(to_plain(state_of_rank(value)[0], path))
        case Kind.STATEFUL:
            return to_plain(value.state_dict(), path)
        case _:
            return value


def _held_still(tensor: Any) -> Any:
    """Return a parameter as it is, and a copy of a buffer, which a forward pass may change.

    What has no memory to copy is returned as it is too: it is refused later, by its name.
    """
    is_buffer = isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter)
    if not is_buffer or is_lazy(tensor) or tensor.layout is not torch.strided:
        return tensor
    return tensor.detach().clone() if tensor.nbytes <= _MAX_CLONED_BYTES else tensor


def _optimizer(optimizer: Optimizer, path: str, names: Mapping[int, str]) -> dict[str, Any]:
    groups = optimizer_names(optimizer, names, path)
    flat = [name for group in groups for name in group]
    given = optimizer.state_dict()
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, flat, strict=True))
    if unknown := [key for key in given["state"] if key not in by_number]:
        raise Unsupported(f"{path}: the optimizer has a state {unknown[0]!r} that belongs to no parameter")
    return {
        "class": class_of(optimizer),
        "state": {by_number[number]: value for number, value in given["state"].items()},
        "param_groups": [
            {**{key: value for key, value in group.items() if key != "param_names"}, "params": called}
            for group, called in zip(given["param_groups"], groups, strict=True)
        ],
    }
