"""Plans between foreign tensors and global ones: moves of boxes, in either direction. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from checkpoint.engine.plan import TensorSpec
from checkpoint.format.box import Box


@dataclass(frozen=True, slots=True)
class Foreign:
    """A tensor of a foreign checkpoint: its name there, and whose it is, by axis ({"tensor": 1})."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    at: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        where = ", ".join(f"{axis}={rank}" for axis, rank in self.at.items())
        return f"{self.name} ({where})" if where else self.name


class How(Enum):
    """What a move does with the elements of its box."""

    FILL = "fill"  # they are the tensor's
    SAME = "same"  # another move fills the box: these have to be equal
    MEAN = "mean"  # the tensor's are the mean over all moves of the box


@dataclass(frozen=True, slots=True)
class Move:
    """The same elements in a foreign tensor and in a global one; both by their number in the plan.

    `target[target_box] = source[source_box].transpose(order).reshape(target_box.size)`; the reshape only adds
    or drops dims of one element. A writer goes the other way.
    """

    source: int
    source_box: Box
    order: tuple[int, ...]
    target: int
    target_box: Box
    how: How


@dataclass(frozen=True, slots=True)
class Plan:
    """How foreign tensors and global ones hold the same content.

    The boxes that moves fill (or average into) cover every global tensor exactly once. `padding` lists boxes
    of foreign tensors that hold nothing, `dropped` the foreign tensors that rules leave out by name.
    """

    foreign: tuple[Foreign, ...]
    tensors: tuple[TensorSpec, ...]
    moves: tuple[Move, ...]
    padding: tuple[tuple[int, Box], ...]
    dropped: tuple[int, ...]
