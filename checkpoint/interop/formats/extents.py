"""Where a stored tensor's elements lie in a file, and reading a box of them by ranges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.interop.formats.contract import Array
from checkpoint.interop.place import Place

_MAX_DIMS = 32  # numpy's limit was that for long
_MAX_NUMEL = 1 << 60
_MAX_REPEATED_BYTES = 64 << 20  # of a tensor whose elements lie on top of each other,
_MAX_REPEATS = 16  # or so many times the bytes that it views, if these are more
_NEAR_BYTES = 256 << 10  # rows no farther apart are read in one go,
_MAX_WASTE = 4  # and so are larger regions of which at least a part in so many is wanted,
_MAX_GO_BYTES = 64 << 20  # up to this size


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor's elements in a file: `offset` is the byte of the first one, `strides` count elements."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file lie from the first to the last element."""
        return _reach(self.shape, self.strides) * itemsize(self.dtype)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements lie row by row."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def check_shape(shape: Any, where: str) -> tuple[int, ...]:
    """Return a shape that was read from somewhere. Raises Corrupt if no tensor has it."""
    if not isinstance(shape, list | tuple) or len(shape) > _MAX_DIMS:
        raise Corrupt(f"{where} cannot have the shape {ascii(shape)[:80]}")
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(n or 1 for n in shape) > _MAX_NUMEL:
        raise Corrupt(f"{where} cannot have the shape {ascii(shape)[:80]}")
    return tuple(shape)


def check_repeats(shape: Sequence[int], dtype: str, viewed_bytes: int) -> None:
    """See that a view of so many bytes does not repeat them beyond reason.

    Expanded masks and buffers do, and are read as they are. A tensor of more than 64 MiB that is more than 16
    times what it views would cost what no file of that size should: it is refused, as Unsupported.
    """
    num_bytes = math.prod(shape) * itemsize(dtype)
    if num_bytes > max(_MAX_REPEATED_BYTES, _MAX_REPEATS * viewed_bytes):
        raise Unsupported(
            f"it holds a tensor of the shape {tuple(shape)}, {num_bytes} bytes, that repeats a storage of "
            f"{viewed_bytes}: above {_MAX_REPEATED_BYTES >> 20} MiB, no tensor is read that is more than "
            f"{_MAX_REPEATS} times its storage. Save it contiguous(), or leave it out"
        )


def read_box(place: Place, extent: Extent, box: Box) -> Array:
    """Return the bits of a box of a stored tensor, row by row. Reads little more than its bytes."""
    box.within(Box.whole(extent.shape))
    out: Array = np.empty(box.size, dtype_of(extent.dtype).carrier)
    if not box.is_empty:
        _fill(place, extent, box.start, out)
    return out


def _fill(place: Place, extent: Extent, start: tuple[int, ...], out: Array) -> None:
    size, width = out.shape, out.itemsize
    reach = _reach(size, extent.strides)
    begin = extent.offset + width * sum(a * stride for a, stride in zip(start, extent.strides, strict=True))
    if reach == out.size and out.flags.c_contiguous and _is_row_by_row(size, extent.strides):
        place.read_into(extent.path, begin, out)
    elif reach * width <= max(_NEAR_BYTES, min(_MAX_GO_BYTES, _MAX_WASTE * out.nbytes)):
        region = place.read(extent.path, begin, reach * width)
        strides = [stride * width for stride in extent.strides]
        out[...] = np.ndarray(size, out.dtype, buffer=region, strides=strides)
    else:
        dim = max(range(len(size)), key=lambda each: (size[each] > 1) * extent.strides[each])
        middle = size[dim] // 2
        first, second = [slice(None)] * len(size), [slice(None)] * len(size)
        first[dim], second[dim] = slice(middle), slice(middle, None)
        _fill(place, extent, start, out[tuple(first)])
        _fill(place, extent, (*start[:dim], start[dim] + middle, *start[dim + 1 :]), out[tuple(second)])


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements lie from the first to the last one."""
    return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _is_row_by_row(size: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for n, stride in zip(reversed(size), reversed(strides), strict=True):
        if n > 1 and stride != expected:
            return False
        expected *= n
    return True
