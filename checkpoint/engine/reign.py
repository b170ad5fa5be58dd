"""The newest world that a host knows: it tells late shares of an older one from those that may still come."""

from dataclasses import dataclass


@dataclass(slots=True)
class Reign:
    """The newest generation seen, since when, and whether its first rank lives here."""

    generation: int = 0
    since_s: float = 0.0
    leads: bool = False

    def see(self, generation: int, leads: bool, now_s: float) -> None:  # noqa: FBT001 - a fact, not a switch
        """Take note of a share of a generation, whose first rank lives on this host or does not."""
        if generation > self.generation:
            self.generation, self.since_s = generation, now_s
        if generation == self.generation:
            self.leads = leads
