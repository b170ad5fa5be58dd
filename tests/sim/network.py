"""Which simulated members can reach each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from tests.sim.node import Node


@dataclass
class Network:
    """The pairs of members that are parted; who is isolated is apart from everybody."""

    parted: set[frozenset[str]] = field(default_factory=set)

    def part(self, one: Node, other: Node) -> None:
        self.parted.add(frozenset((one.name, other.name)))

    def join(self, one: Node, other: Node) -> None:
        self.parted.discard(frozenset((one.name, other.name)))

    def are_apart(self, one: Node, other: Node) -> bool:
        """Whether two members cannot reach each other."""
        return one.is_isolated or other.is_isolated or frozenset((one.name, other.name)) in self.parted

    def unreachable(self, node: Node, peers: Mapping[str, Node | None]) -> tuple[str, ...]:
        """Name the peers that a member cannot reach: who is gone, or apart from it."""
        others = {name: peer for name, peer in peers.items() if peer is not node}
        return tuple(name for name, peer in others.items() if peer is None or self.are_apart(node, peer))

    def is_torn(self, members: Sequence[Node]) -> bool:
        """Whether some of these cannot reach each other."""
        is_whole = not (self.parted or any(node.is_isolated for node in members))
        return not is_whole and any(self.are_apart(one, other) for one, other in combinations(members, 2))

    def touches(self, node: Node) -> bool:
        """Whether a member is apart from somebody."""
        return node.is_isolated or any(node.name in pair for pair in self.parted)
