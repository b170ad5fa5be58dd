"""The newest world that a host knows: it tells late shares of an older one from those that may still come."""

from dataclasses import dataclass


@dataclass(slots=True)
class Reign:
    """The newest generation seen, since when, and the host of its first rank."""

    generation: int = 0
    since_s: float = 0.0
    leader: str = ""

    def see(self, generation: int, leader: str, now_s: float) -> None:
        """Take note of a share of a generation, whose first rank lives on host `leader`."""
        if generation > self.generation:
            self.generation, self.since_s = generation, now_s
        if generation == self.generation:
            self.leader = leader
