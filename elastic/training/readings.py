"""Refuses numbers read from sharded tensors: torch gives that of this rank's rows for the whole tensor's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic.errors import JobRejected

_READ = torch.ops.aten._local_scalar_dense.default


@contextmanager
def no_readings(reader: str, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Raise JobRejected where the job's `reader` reads a number (`float`, `item`, a condition) from rows of
    these parameters, or from what it computed of them. Costs nothing where none is read.
    """

    def read(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if all(placement.is_replicate() for placement in tensor.placements):
            return operation(tensor.to_local(), *args[1:], **kwargs)
        raise JobRejected(
            f"the job's {reader} reads a number from {_origin(tensor, parameters)} (by float(), item() or a "
            "condition), of which each rank has some rows only: read it in the forward of the layer that has "
            "the parameter, or set training.parameter_copies = 0"
        )

    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handlers[_READ] = read
    try:
        yield
    finally:
        del handlers[_READ]


def _origin(tensor: Tensor, parameters: Mapping[str, nn.Parameter]) -> str:
    """Name the parameters that autograd remembers a tensor was computed from."""
    seen, left = set[Any](), [tensor.grad_fn]
    found = {id(tensor)}
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            left.extend(before for before, _ in node.next_functions)
    names = [name for name, parameter in parameters.items() if id(parameter) in found]
    return ", ".join(names) or "a parameter or its gradient"
