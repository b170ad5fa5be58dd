"""Sees that every micro-batch comes to the same layers in the same order, on every rank.

Nothing else would: ranks would add up their peers' gradients of other layers, or wait for what nobody sends.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch

from elastic.errors import JobRejected
from elastic.training.ports import World

GATHER, COLLECT, END = range(3)
"""What a micro-batch comes to: a unit's parameters, a unit's gradients, or its end."""

_NUM_KINDS = 3


class Lockstep:
    """The order of one world. Its first micro-batch is agreed on stop by stop, before anything is sent there;
    each rank compares the later ones with that alone, which costs nothing.

    `layers[u]` names unit u; other numbers are not of one layer. `waiting` is entered while ranks are waited
    for.
    """

    def __init__(self, layers: Sequence[str], waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._layers, self._waiting = layers, waiting
        self._order: list[int] = []
        self._position: int | None = None  # in the order, once the first micro-batch is over

    def come_to(self, world: World, kind: int, unit: int = 0) -> None:
        """Go on where every micro-batch comes by now.

        Raises JobRejected where another one comes to something else, and Broken.
        """
        stop = unit * _NUM_KINDS + kind
        if self._position is None:
            self._agree(world, stop)
            self._order.append(stop)
        elif stop != self._order[self._position]:
            self._refuse(stop, self._order[self._position])
        else:
            self._position += 1
        if kind == END:
            self._position = 0

    def _agree(self, world: World, stop: int) -> None:
        """See that all ranks are at this stop."""
        if world.size == 1:
            return
        told = torch.tensor([stop, -stop])
        with self._waiting():
            world.all_reduce(told, "max")
        highest, lowest = int(told[0]), -int(told[1])
        if highest != lowest:
            self._refuse(lowest, highest)

    def _refuse(self, one: int, other: int) -> NoReturn:
        raise JobRejected(
            f"a micro-batch came to {self._name(one)} where another one came to {self._name(other)}: sharded "
            "parameters need the same layers in the same order in every micro-batch; set "
            "training.parameter_copies = 0"
        )

    def _name(self, stop: int) -> str:
        unit, kind = divmod(stop, _NUM_KINDS)
        if kind == END or unit not in range(len(self._layers)):
            return "its end"
        return f"the {'parameters' if kind == GATHER else 'gradients'} of {self._layers[unit]}"
