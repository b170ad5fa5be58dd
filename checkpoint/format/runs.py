"""Where the bytes of a box lie in its tensor: in runs, each of them in one stretch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoint.format.box import Box


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of `num_bytes` each: where they begin in their tensor, in bytes, never listed all at once."""

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    num_bytes: int

    @classmethod
    def of(cls, shape: Sequence[int], box: Box, itemsize: int) -> "Runs":
        """Split a box into the dims that step from run to run, and those within one."""
        strides = [itemsize * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        dim = len(shape)
        while dim and box.size[dim - 1] == shape[dim - 1]:
            dim -= 1
        dim = max(0, dim - 1)  # the first dim that is not whole is still contiguous
        base = sum(a * stride for a, stride in zip(box.start, strides, strict=True))
        run_bytes = itemsize * math.prod(box.size[dim:])
        return cls(base, box.size[:dim], tuple(strides[:dim]), run_bytes)

    def are_in_step(self, num_bytes: int) -> bool:
        """Whether all of them begin at the same place of a block of so many bytes."""
        return all(stride % num_bytes == 0 for stride in self.strides)

    def starts(self, first: int, last: int) -> NDArray[np.uint64]:
        """Return the starts of the runs number `first` to `last`, exclusive."""
        if len(self.sizes) == 1:
            numbers = np.arange(first, last, dtype=np.uint64)
            return numbers * np.uint64(self.strides[0]) + np.uint64(self.base)
        rest = np.arange(first, last, dtype=np.uint64)
        starts = np.full(last - first, self.base, np.uint64)
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            rest, coordinate = np.divmod(rest, np.uint64(size))
            starts += coordinate * np.uint64(stride)
        return starts
