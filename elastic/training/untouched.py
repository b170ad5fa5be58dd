"""Sees that a forward pass leaves the model's state alone, which would depend on who computes what."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from checkpoint import fingerprint_tensor, flatten_state
from elastic.errors import JobRejected
from elastic.training.carrying import has_extra


@contextmanager
def leaving_state_alone(model: nn.Module) -> Iterator[None]:
    """Raise JobRejected if a buffer or a module's extra state changes inside."""
    before = _beside_parameters(model)
    yield
    if _beside_parameters(model) != before:
        raise JobRejected(
            "the model changes a buffer or extra state in its forward pass: its state would depend on who "
            "computes which micro-batch; use layers without running statistics (LayerNorm or GroupNorm for "
            "BatchNorm)"
        )


def _beside_parameters(model: nn.Module) -> list[Any]:
    buffers = [(id(buffer), buffer._version) for buffer in model.buffers()]
    return [buffers, *(_content(each.get_extra_state()) for each in model.modules() if has_extra(each))]


def _content(extra: Any) -> tuple[Any, list[int]]:
    plain, tensors = flatten_state(extra)
    return plain, [fingerprint_tensor(each) for each in tensors.values()]
