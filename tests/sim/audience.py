"""Who is told, and what a driver ordered."""

from dataclasses import dataclass
from typing import Protocol

from elastic.control.events import Event
from elastic.control.instructions import FormWorld
from tests.sim.node import Node


class Audience(Protocol):
    """Whoever takes what members tell."""

    def hear(self, node: Node, event: Event) -> bool:
        """Take what a member tells; False if nobody listens to it."""


@dataclass
class World:
    """One world that was ordered, and the driver that owns it."""

    order: FormWorld
    owner: str
