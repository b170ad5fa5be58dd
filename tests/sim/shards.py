"""A state in shards: a world may only go on without members that hold the last copies if these are gone."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tests.sim.node import Node


@dataclass
class Shards:
    """Who holds the shards, of each of which there are `copies` (0: all hold everything)."""

    copies: int = 0
    holders: Sequence[Node] = ()

    def settle(
        self, members: Sequence[Node], leaving: Collection[str], is_intact: Callable[[Node], bool]
    ) -> None:
        """Let a world come to hold the state, but for those who are leaving."""
        missing = [node for node in self.holders if node not in members]
        intact = [node for node in missing if not node.is_blank and is_intact(node)]
        allowed = min(self.copies, len(self.holders)) - 1
        if self.copies and len(missing) > allowed >= len(missing) - len(intact):
            raise AssertionError(f"shards of {[node.name for node in intact]} are thrown away")
        self.holders = [node for node in members if node.name not in leaving]
