"""Stages and experts: which ranks of an axis hold the layers and experts that names speak of. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from checkpoint.errors import FormatError, Misuse
from checkpoint.format.placement import Only

LAYER = r"(?:^|.*\.)layers\.(?P<number>\d+)\..*"
EXPERT = r".*\.experts\.(?P<number>\d+)\..*"


def deal_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the stage of each layer: consecutive ones, the first stages one more if it does not come out.

    Raises Misuse if a stage would get no layer.
    """
    if not 1 <= num_stages <= num_layers:
        raise Misuse(f"the {num_layers} layers cannot be dealt to {num_stages} stages: each needs its own")
    counts = [num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages)]
    return tuple(stage for stage, count in enumerate(counts) for _ in range(count))


@dataclass(frozen=True, slots=True)
class StageMap:
    """Which pipeline stages hold a tensor, by its name.

    `layers[n]` is the stage of layer n, where `pattern` finds n in a name as its group `number`. `ends` maps
    patterns of the other names to their stages: several for tied weights, of which each stage holds a copy.
    """

    layers: tuple[int, ...]
    ends: Mapping[str, tuple[int, ...]]
    pattern: str = LAYER

    def placement(self, name: str) -> Only:
        """Return where the tensor of this name is. Raises FormatError if the map does not say."""
        number = _number(self.pattern, name)
        if number is not None and number < len(self.layers):
            return Only((self.layers[number],))
        found = [stages for pattern, stages in self.ends.items() if re.fullmatch(pattern, name)]
        if number is not None or len(found) != 1:
            raise FormatError(
                f"tensor {name!r} fits {len(found)} of the patterns {list(self.ends)}, and is in none of the "
                f"{len(self.layers)} layers: the stage map has to name its stages exactly once"
            )
        return Only(found[0])


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Which expert rank holds each expert's tensors: `ranks[e]` is that of expert e, named as `number`."""

    ranks: tuple[int, ...]
    pattern: str = EXPERT

    def placement(self, name: str) -> Only | None:
        """Return where the tensor of this name is; None if it is no expert's. Raises FormatError."""
        number = _number(self.pattern, name)
        if number is None:
            return None
        if number >= len(self.ranks):
            raise FormatError(f"tensor {name!r} belongs to none of the {len(self.ranks)} experts")
        return Only((self.ranks[number],))


def _number(pattern: str, name: str) -> int | None:
    found = re.fullmatch(pattern, name)
    return int(found["number"]) if found else None
