"""What the trainer asks of the outside: a world to train in, orders to heed, and somewhere to tell events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from elastic.control.events import Event

Emit = Callable[[Event], None]


class Broken(Exception):
    """The world of this generation is over: drop every reference to it and form a new one."""

    def __init__(self, generation: int, why: str) -> None:
        super().__init__(f"world {generation}: {why}")
        self.generation = generation
        self.why = why


class Collectives(Protocol):
    """The collectives of one generation, blocking; `hosts[rank]` names a rank's machine.

    CPU and device tensors are both accepted. Every method raises Broken when the world is over; what a
    failed call left in its tensors is worthless.
    """

    generation: int
    rank: int
    size: int
    hosts: tuple[str, ...]

    def exchange(self, send: Sequence[Tensor | None], receive: Sequence[Tensor | None]) -> None:
        """Swap tensors with every other rank at once; the index is the peer, None means nothing."""

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        """Gather the equally long slices of all ranks into `out`, in rank order."""

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> None:
        """Reduce in place over all ranks."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to a rank that receives one of this size."""

    def receive(self, tensor: Tensor, source: int) -> None:
        """Receive a tensor of the sent size and dtype."""


class World(Collectives, Protocol):
    """The same, blocking and beside the caller."""

    def beside(self, work: Callable[[], None]) -> None:
        """Run this work, which uses collectives of this world, beside the caller, after what was put there
        before. Until `join` the caller uses none itself. Raises nothing.
        """

    def join(self) -> None:
        """Wait until all work beside is done."""


@dataclass(frozen=True, slots=True)
class Flags:
    """What a member was told: the newest generation ordered (0: none), and whether to stop (1 or 0)."""

    next_generation: int = 0
    stop: int = 0


class Orders(Protocol):
    """What this member was told while it trained."""

    def pending(self) -> Flags:
        """Return it, without waiting."""

    def check(self, generation: int) -> None:
        """Raise Broken if this generation's world is to be left at once, in the middle of a step."""
