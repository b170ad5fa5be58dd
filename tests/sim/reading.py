"""Data that comes late for whoever computes one step."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.sim.node import Node


@dataclass
class SlowData:
    """One step's data takes `lasts_s`, for one of those who compute it (which looks like a hang where others
    are done) or for all.
    """

    step: int = -1
    lasts_s: float = 0.0
    is_for_all: bool = False

    def hold_up(self, members: Sequence[Node], now: float) -> None:
        """Let members that begin a step read slowly, if it is this one."""
        reading = [node for node in members if node.standing.committed == self.step]
        for node in reading if self.is_for_all else reading[-1:]:
            node.busy_until = now + self.lasts_s
            node.blemished_at = node.blemished_at if self.is_for_all else node.busy_until
