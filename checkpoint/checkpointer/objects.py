"""The kinds of things that a state is made of, and what parameters are called. Moves nothing."""

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from checkpoint.checkpointer.rng import Rng
from checkpoint.engine.likeness import check_depth
from checkpoint.engine.on_ranks import OnRanks
from checkpoint.engine.per_rank import PerRank
from checkpoint.errors import Mismatch, Unsupported
from checkpoint.format.tree import is_bulk

# Wrappers that stand in a name without being part of the model: torch.compile, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


class Kind(Enum):
    """How a thing is saved and restored."""

    MODULE = "module"
    OPTIMIZER = "optimizer"
    PER_RANK = "per rank"  # each rank has its own: a data loader, a generator, what is marked so
    STATEFUL = "stateful"  # has state_dict and load_state_dict, the same on every rank
    TENSOR = "tensor"
    DICT = "dict"
    LIST = "list"
    TUPLE = "tuple"
    PLAIN = "plain"


def kind_of(value: Any) -> Kind:
    """Tell how a thing is saved and restored."""
    if isinstance(value, (torch.Tensor, OnRanks)):
        return Kind.TENSOR
    for container, kind in ((dict, Kind.DICT), (list, Kind.LIST), (tuple, Kind.TUPLE)):
        if isinstance(value, container):
            return kind
    if isinstance(value, nn.Module):
        return Kind.MODULE
    if isinstance(value, Optimizer):
        return Kind.OPTIMIZER
    if isinstance(value, (PerRank, Rng, torch.Generator)):
        return Kind.PER_RANK
    has_state = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    if not has_state or isinstance(value, type):
        return Kind.PLAIN
    return Kind.PER_RANK if isinstance(value, DataLoader) else Kind.STATEFUL


def walk(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the things in a nested state that are more than plain values, with their paths.

    Raises FormatError for what is nested too deep.
    """
    check_depth(path, depth)
    match kind_of(value):
        case Kind.DICT:
            for key, item in value.items():
                yield from walk(item, f"{path}/{key}" if path else str(key), depth + 1)
        case Kind.LIST | Kind.TUPLE if not is_bulk(value):
            for number, item in enumerate(value):
                yield from walk(item, f"{path}/{number}" if path else str(number), depth + 1)
        case Kind.LIST | Kind.TUPLE | Kind.PLAIN:
            pass
        case _:
            yield path, value


def module_state(module: nn.Module, path: str) -> dict[str, Any]:
    """Return a module's parameters, buffers and extra state by name: the very tensors, without a wrapper.

    Raises Unsupported for a module whose parameters do not show which part of them this rank holds.
    """
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in module.modules()):
        raise Unsupported(
            f"{path or 'the state'}: FullyShardedDataParallel hides its layout: use fully_shard (FSDP2)"
        )
    inner = module.module if isinstance(module, (DataParallel, DistributedDataParallel)) else module
    return {_WRAPPERS.sub("", name): value for name, value in inner.state_dict(keep_vars=True).items()}


def parameter_names(state: Any) -> dict[int, str]:
    """Map the id of every parameter of every module in a state to its name; a tied one has its first."""
    found: dict[int, tuple[str, str]] = {}
    for path, value in walk(state):
        if kind_of(value) is Kind.MODULE:
            for name, tensor in module_state(value, path).items():
                if isinstance(tensor, nn.Parameter):
                    found.setdefault(id(tensor), (path, name))
    num_modules: dict[str, set[str]] = {}
    for path, name in found.values():
        num_modules.setdefault(name, set()).add(path)
    return {
        number: name if len(num_modules[name]) == 1 else f"{path}.{name}"
        for number, (path, name) in found.items()
    }


def class_of(optimizer: Optimizer) -> str:
    """Name an optimizer's class; its module may change between a notebook and a script."""
    return type(optimizer).__qualname__


def optimizer_names(optimizer: Optimizer, names: Mapping[int, str], path: str) -> list[list[str]]:
    """Return the names of an optimizer's parameters by group; one that no module has gets a number.

    Raises Mismatch if two of them have one name.
    """
    groups, used, number = [], set(), 0
    for group in optimizer.param_groups:
        called = []
        for parameter in group["params"]:
            name = names.get(id(parameter), f"#{number}")
            if name in used:
                raise Mismatch(f"{path}: two parameters of the optimizer are called {name!r}")
            used.add(name)
            called.append(name)
            number += 1
        groups.append(called)
    return groups


def state_of_rank(value: Any) -> tuple[Any, Callable[[Any], object]]:
    """Return the state of a thing that differs by rank, and how it is put back."""
    if isinstance(value, torch.Generator):
        return value.get_state(), value.set_state
    return value.state_dict(), value.load_state_dict
