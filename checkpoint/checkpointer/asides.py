"""Targets that share memory: read aside, and put where they belong when everything is there.

A buffer may well be a view of a parameter: then a checkpoint of the model has the same values for both. To
know whether it has, both have to be read whole, which they cannot be into the memory that they share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from checkpoint.checkpointer.sharing import Request
from checkpoint.engine.overlaps import find_overlaps
from checkpoint.engine.targets import Array, Target, Wanted
from checkpoint.errors import Mismatch
from checkpoint.format.dtypes import itemsize

_MAX_NAMED = 5


class Place(NamedTuple):
    """A rank's own tensor, which request number `request` fills."""

    path: str
    own: torch.Tensor
    request: int


@dataclass(frozen=True, slots=True)
class Aside:
    """A wanted box that is read aside, as it shares memory with `others`, which are paths."""

    path: str
    others: tuple[str, ...]
    wanted: Wanted
    aside: Wanted

    def put(self) -> None:
        """Copy what was read to where it belongs."""
        Target(self.wanted).put(self.wanted.box.start, self._read())

    def is_there(self) -> bool:
        """Whether what was read is where it belongs, bit by bit."""
        there = Target(self.wanted).get(self.wanted.box)
        return np.array_equal(_bytes(there), _bytes(self._read()))

    def _read(self) -> Array:
        return Target(self.aside).get(self.aside.box)


def set_aside(requests: Sequence[Request], places: Sequence[Place]) -> tuple[list[Request], list[Aside]]:
    """Have what shares memory read into memory of its own; return the requests, and what is to be put back.

    Of several requests for the very same view only one may be among the places.
    """
    overlaps = find_overlaps([place.own for place in places])
    changed, asides = list(requests), []
    for number in sorted(overlaps):
        request = requests[places[number].request]
        own = [_aside(one, number, places, overlaps) for one in request.wanted]
        changed[places[number].request] = replace(request, wanted=tuple(one.aside for one in own))
        asides += own
    return changed, asides


def put_all(asides: Sequence[Aside]) -> None:
    """Put what was read aside where it belongs. Raises Mismatch if it differs in memory that is shared."""
    for one in asides:
        one.put()
    for one in asides:
        if not one.is_there():
            more = f" and {len(one.others) - _MAX_NAMED} more" if len(one.others) > _MAX_NAMED else ""
            raise Mismatch(
                f"{one.path} shares memory with {', '.join(one.others[:_MAX_NAMED])}{more} here, and in the "
                "checkpoint they differ there: give each a tensor of its own (clone())"
            )


def _aside(
    wanted: Wanted, number: int, places: Sequence[Place], overlaps: Mapping[int, Sequence[int]]
) -> Aside:
    memory = bytearray(wanted.box.numel * itemsize(wanted.dtype))
    others = tuple(places[other].path for other in overlaps[number])
    return Aside(places[number].path, others, wanted, replace(wanted, target=memory))


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
