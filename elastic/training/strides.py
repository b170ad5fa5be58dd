"""How what belongs to a parameter lies in memory: as torch has it, and kernels need it."""

import torch
from torch import Tensor


def strides_beside(parameter: Tensor) -> tuple[int, ...]:
    """Return how torch lays out a gradient: as its parameter if that is dense, else row by row."""
    dense = torch.empty_like(parameter, device="meta").stride()
    return dense if dense == parameter.stride() else torch.empty(parameter.shape, device="meta").stride()


def laid_beside(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape as it has to lie; itself if it does already."""
    if tensor.stride() == parameter.stride():
        return tensor
    strides = strides_beside(parameter)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
