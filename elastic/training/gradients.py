"""A model's gradients as flat float32 rows, with a place for every virtual rank's loss. Knows no world."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic.errors import JobRejected
from elastic.training.tree import padded_length


class GradientRows:
    """Rows of memory, each as long as all gradients and all virtual ranks' losses together.

    Parameters' gradients are views of the row they were last bound to. Rows are made when they are needed
    and kept.
    """

    def __init__(self, model: nn.Module, virtual_ranks: int) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise JobRejected(
                "the model has no parameter that requires a gradient: there is nothing to train"
            )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise JobRejected(
                    f"parameter {name} is {parameter.dtype}: keep parameters in float32, and use "
                    "autocast in the job's loss"
                )
        self.num_parameters = sum(parameter.numel() for parameter in self._parameters)
        self.virtual_ranks = virtual_ranks
        self.num_elements = self.num_parameters + virtual_ranks
        self._length = padded_length(self.num_elements, range(1, virtual_ranks + 1))
        self._free: list[Tensor] = []
        self.device = self._parameters[0].device

    def take(self) -> Tensor:
        """Lend a row; what is in it is worthless."""
        return self._free.pop() if self._free else torch.zeros(self._length, device=self.device)

    def give_back(self, row: Tensor) -> None:
        """Take a row back."""
        self._free.append(row)

    def bind(self, row: Tensor) -> None:
        """Let backward add to this row, and the optimizer read from it."""
        for parameter, part in zip(self._parameters, self.gradients(row), strict=True):
            parameter.grad = part.view(parameter.shape)

    def gradients(self, row: Tensor) -> Sequence[Tensor]:
        """Return each parameter's part of a row."""
        return torch.split(self.gradient(row), [parameter.numel() for parameter in self._parameters])

    def gradient(self, row: Tensor) -> Tensor:
        """Return the part of a row that holds gradients."""
        return row[: self.num_parameters]

    def losses(self, row: Tensor) -> Tensor:
        """Return the part of a row that holds the virtual ranks' losses."""
        return row[self.num_parameters : self.num_elements]
