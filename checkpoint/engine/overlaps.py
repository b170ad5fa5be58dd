"""Which tensors share memory with each other, or with themselves: told by addresses, not by what is there."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

_MAX_WORK = 10_000  # steps of numpy's search; what it cannot tell by then counts as shared
_MAX_OPEN = 64  # tensors that interleave; of more it is not searched but taken that they share memory

Array = np.ndarray[Any, np.dtype[Any]]


class _Span(NamedTuple):
    """The addresses from a tensor's first byte to its last; other tensors may have some between them."""

    device: tuple[str, int]
    start: int
    end: int
    number: int


class _Strided:
    """The memory of a tensor as numpy sees it, on whatever device: nothing is read through it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": f"|V{tensor.itemsize}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
        }


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor are one in memory."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:  # neither this dim nor those before it are enough to tell
            return _folds(np.asarray(_Strided(tensor)))
        reach += stride * (size - 1)
    return False


def find_overlaps(tensors: Sequence[torch.Tensor]) -> Mapping[int, Sequence[int]]:
    """Return for each tensor that shares memory with others which those are, by their numbers.

    Those whose addresses interleave without a common element share nothing, as columns of one matrix. More
    than 64 that do so at one place are listed nonetheless, each with some of the others.
    """
    found: dict[int, list[int]] = {}
    spans = sorted(_span(number, tensor) for number, tensor in enumerate(tensors) if tensor.numel())
    still_open: list[_Span] = []
    for span in spans:
        still_open = [one for one in still_open if one.end > span.start and one.device == span.device]
        if len(still_open) > _MAX_OPEN:
            others = [one for one in still_open if one.number not in found] or still_open[-1:]
        else:
            others = [one for one in still_open if _share(tensors[one.number], tensors[span.number])]
        for other in others:
            found.setdefault(other.number, []).append(span.number)
            found.setdefault(span.number, []).append(other.number)
        still_open.append(span)
    return found


def _span(number: int, tensor: torch.Tensor) -> _Span:
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    device = tensor.device.type, tensor.device.index or 0
    return _Span(device, start, start + (last + 1) * tensor.itemsize, number)


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _touch(np.asarray(_Strided(one)), np.asarray(_Strided(other)))


def _folds(array: Array) -> bool:
    """Whether two elements are one. They differ first in some dim, and may be moved to the front of it."""
    first = slice(0, 1)
    return any(
        _touch(array[(first,) * (dim + 1)], array[(*(first,) * dim, slice(1, None))])
        for dim in range(array.ndim)
    )


def _touch(one: Array, other: Array) -> bool:
    # The stub knows of no search with an end; numpy does, and says yes at it.
    return bool(np.may_share_memory(one, other, max_work=_MAX_WORK))  # type: ignore[arg-type]
