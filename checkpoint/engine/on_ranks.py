"""Tensors that some ranks hold in full and the others not at all, as the state of a sharded optimizer."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class OnRanks:
    """A leaf that only `ranks` of a world hold: `tensor` is this rank's, None if it is none of them.

    Every rank of the world gives the same dtype, shape and ranks; one of the holders writes it.
    """

    tensor: torch.Tensor | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def own(self) -> torch.Tensor:
        """Return the rank's own memory: nothing, if it holds nothing."""
        return torch.empty(0, dtype=self.dtype) if self.tensor is None else self.tensor
