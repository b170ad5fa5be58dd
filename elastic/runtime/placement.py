"""On which node a member starts: where fewest of its run's are, for copies and parity lie on other hosts than
what they protect.

Placement groups would fix how many members there are, and where, before they start; ADR 0015.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HOST_LENGTH = 12  # of a node's name in a host's


@dataclass(frozen=True, slots=True)
class Room:
    """A living node: how many of the run's members are there, how many of them are still starting, and what
    of its resources nobody has taken.
    """

    node: str
    num_members: int
    num_starting: int
    free: Mapping[str, float]

    def has_room(self, demand: Mapping[str, float]) -> bool:
        """Whether one more fits besides those whose start has not taken its part yet, perhaps."""
        return all(
            self.free.get(name, 0.0) >= amount * (1 + self.num_starting) for name, amount in demand.items()
        )


def choose_room(rooms: Iterable[Room], demand: Mapping[str, float]) -> Room | None:
    """Choose the node with the fewest members of those that have room; None if none has.

    Ties go to the one with the most free, then by name.
    """
    with_room = [room for room in rooms if room.has_room(demand)]
    return min(
        with_room,
        key=lambda room: (room.num_members, -sum(room.free.get(name, 0.0) for name in demand), room.node),
        default=None,
    )


def strategy_for(room: Room | None) -> Any:
    """Return Ray's strategy: bound to a node that no other member is on, else going elsewhere if it must.

    Without any room now, Ray waits for some anywhere, and its autoscaler hears of it.
    """
    if room is None:
        return "SPREAD"
    is_alone = room.num_members == 0
    return NodeAffinitySchedulingStrategy(room.node, soft=not is_alone, _spill_on_unavailable=not is_alone)


def list_rooms(hosts: Iterable[str], starting: Iterable[str], draining: Collection[str]) -> list[Room]:
    """Ask Ray for the nodes; `hosts` has one entry a member, `starting` those of members not heard of yet."""
    free: Mapping[str, Mapping[str, float]] = ray._private.state.state.available_resources_per_node()  # type: ignore[no-untyped-call]  # Ray's
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
    living = [str(node["NodeID"]) for node in nodes if node["Alive"]]
    taken, coming = list(hosts), list(starting)
    return [
        Room(node, taken.count(host), coming.count(host), free.get(node, {}))
        for node in living
        if (host := node[:HOST_LENGTH]) not in draining
    ]
