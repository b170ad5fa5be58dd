"""Torch tensors as the engine sees them: named leaves of a nested state, and their raw bits."""

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Unsupported
from checkpoint.format.dtypes import DTYPES
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.layout import Box
from checkpoint.format.tree import flatten, unflatten

UNSTRIDED = torch.float4_e2m1fn_x2  # the one dtype whose elements torch copies only in one run


class FlatState(NamedTuple):
    """A nested state taken apart: plain data with references, and the tensors they refer to by name."""

    skeleton: Any
    tensors: Mapping[str, torch.Tensor]


def flatten_state(state: Any) -> FlatState:
    """Take a nested state apart; a tensor that occurs twice (tied weights) is listed once.

    Raises `FormatError` naming the path of what has no plain form, `Unsupported` for a tensor without plain
    memory.
    """
    flat = flatten(state, is_leaf=_is_tensor, key=identity)
    for name, tensor in flat.leaves.items():
        check_plain(name, tensor)
        if tensor.dtype is UNSTRIDED:
            check_copyable(name, tensor)
    return FlatState(flat.skeleton, flat.leaves)


def unflatten_state(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put a nested state together again."""
    return unflatten(skeleton, tensors)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """Describe a tensor."""
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))


def specs_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Describe the tensors of a flattened state."""
    return tuple(spec_of(name, tensor) for name, tensor in tensors.items())


@lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as the format does: "float32"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name. Raises Unsupported when this torch has none such."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Unsupported(
            f"this torch ({torch.__version__}) has no dtype {name!r}: upgrade it to read the checkpoint"
        )
    return found


def fingerprint_tensor(tensor: torch.Tensor) -> int:
    """Return a tensor's content fingerprint: the number its checkpoint records, whatever its layout there."""
    shape = tuple(tensor.shape)
    return fingerprint(raw_bytes(tensor), dtype_name(tensor.dtype), shape, Box.whole(shape))


def raw_bytes(tensor: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return a tensor's elements in row-major order as bytes; a view where the tensor allows it."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.numel() == 0:
        return np.empty(0, np.uint8)
    row = plain.as_strided((plain.numel(),), (1,))  # a single element may have any stride and be contiguous
    return row.view(torch.uint8).numpy()


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raise Unsupported, naming the tensor, if it has no plain memory or a dtype that the format lacks."""
    if is_lazy(tensor):
        raise Unsupported(f"{name}: it is not initialized and has no shape yet: run the model once")
    if tensor.is_nested and tensor.layout is torch.strided:
        raise Unsupported(
            f"{name}: a nested tensor has no plain memory to capture: give its parts, as a list"
        )
    if dtype_name(tensor.dtype) not in DTYPES:
        raise Unsupported(
            f"{name}: the format has no dtype {dtype_name(tensor.dtype)!r}: convert it, or give a "
            "view(torch.uint8) of it"
        )
    if not _has_memory(tensor) or tensor.is_quantized:
        raise Unsupported(
            f"{name}: a {type(tensor).__name__} ({tensor.layout}, {tensor.device}) has no plain memory "
            "to capture: give the full, dense tensor (for a DTensor: its full_tensor())"
        )


def check_copyable(name: str, tensor: torch.Tensor) -> None:
    """Raise Unsupported, naming the tensor, if torch cannot copy what lies scattered of its dtype."""
    if not tensor.is_contiguous():
        raise Unsupported(
            f"{name}: torch copies {dtype_name(tensor.dtype)} only where it lies in one run: "
            "give it contiguous(), or a view(torch.uint8) of it"
        )


def identity(tensor: torch.Tensor) -> Hashable:
    """Return what two tensors have in common if they are one: the same elements of the same memory."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        return id(tensor)
    address = tensor.data_ptr()
    if address == 0:  # an empty one, or one without memory
        if not _has_memory(tensor):
            return id(tensor)
        # Tied weights of which a rank holds nothing are still tied, as they are on other ranks.
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape
    return address, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _has_memory(tensor: torch.Tensor) -> bool:
    is_wrapper = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return tensor.layout is torch.strided and tensor.device.type != "meta" and not is_wrapper
