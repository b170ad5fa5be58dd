"""A model's gradients as flat float32 rows, with a place for every virtual rank's loss. Knows no world."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from elastic.errors import JobRejected
from elastic.training.strides import strides_beside
from elastic.training.tree import ALIGNMENT, padded_length


class GradientRows:
    """Rows of memory, each as long as all virtual ranks' losses and all gradients together, in this order.

    Parameters' gradients are views of the row they were last bound to; `places[i]` is where that of
    `parameters[i]` lies, in the order in which the parameter lies in memory. Rows are made when they are
    needed and kept.
    """

    def __init__(self, model: nn.Module, virtual_ranks: int) -> None:
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if not trained:
            raise JobRejected(
                "the model has no parameter that requires a gradient: there is nothing to train"
            )
        for name, parameter in trained.items():
            if parameter.dtype != torch.float32:
                raise JobRejected(
                    f"parameter {name} is {parameter.dtype}: keep parameters in float32, and use "
                    "autocast in the job's loss"
                )
        self.names, self.parameters = list(trained), list(trained.values())
        self.virtual_ranks = virtual_ranks
        first = -(-virtual_ranks // ALIGNMENT) * ALIGNMENT
        ends = accumulate((parameter.numel() for parameter in self.parameters), initial=first)
        self.places = [slice(start, stop) for start, stop in pairwise(ends)]
        self.num_elements = self.places[-1].stop
        self._kinds = [(each.shape, strides_beside(each)) for each in self.parameters]
        self._length = padded_length(self.num_elements, range(1, virtual_ranks + 1))
        self._free: list[Tensor] = []
        self.device = self.parameters[0].device
        self._bound: list[Tensor] = []

    def take(self) -> Tensor:
        """Lend a row; what is in it is worthless."""
        return self._free.pop() if self._free else torch.zeros(self._length, device=self.device)

    def give_back(self, row: Tensor) -> None:
        """Take a row back."""
        self._free.append(row)

    def bind(self, row: Tensor) -> None:
        """Let backward add to this row, and the optimizer read from it."""
        self._bound = self.views(row)
        for parameter, gradient in zip(self.parameters, self._bound, strict=True):
            parameter.grad = gradient

    def check_bound(self) -> None:
        """Raise JobRejected if a gradient is not where it was bound: what backward gave is not in the row."""
        for name, parameter, gradient in zip(self.names, self.parameters, self._bound, strict=True):
            if parameter.grad is not gradient:
                raise JobRejected(
                    f"the job put another gradient in place of that of {name} (as zero_grad does, or a "
                    "backward with create_graph): gradients are the trainer's, which zeroes them itself; "
                    "leave zero_grad and backward out of the job's loss"
                )

    @property
    def num_writes(self) -> int:
        """How often anything was written to the bound row; 0 while none is."""
        return self._bound[0]._version if self._bound else 0

    def views(self, row: Tensor) -> list[Tensor]:
        """Return each parameter's gradient in a row."""
        return [
            row[place].as_strided(shape, strides)
            for place, (shape, strides) in zip(self.places, self._kinds, strict=True)
        ]

    def gradient(self, row: Tensor) -> Tensor:
        """Return the part of a row that holds gradients."""
        return row[self.places[0].start : self.num_elements]

    def losses(self, row: Tensor) -> Tensor:
        """Return the part of a row that holds the virtual ranks' losses."""
        return row[: self.virtual_ranks]
