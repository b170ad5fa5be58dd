"""Who is there: members by what they are doing, in the order they came. Pure bookkeeping."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Membership:
    """Members that are starting, members that are ready (with their hosts), and the world's members in rank
    order.

    Member names are never reused, so a lost one that speaks again is known to be a stranger.
    """

    prefix: str
    starting: list[str] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)
    world: tuple[str, ...] = ()
    num_named: int = 0

    def name_next(self) -> str:
        """Name a member that is about to start."""
        while self.knows(member := f"{self.prefix}{self.num_named}"):
            self.num_named += 1  # an earlier driver that claimed nothing yet used the same prefix
        self.num_named += 1
        self.starting.append(member)
        return member

    def admit(self, member: str, host: str) -> None:
        """Count a member as ready; one that another driver started is welcome too."""
        if member in self.starting:
            self.starting.remove(member)
        self.hosts[member] = host

    def knows(self, member: str) -> bool:
        """Say whether this member is starting or ready."""
        return member in self.hosts or member in self.starting

    def drop(self, member: str) -> None:
        """Forget a lost member; the world keeps the others in their order."""
        if member in self.starting:
            self.starting.remove(member)
        self.hosts.pop(member, None)
        self.world = tuple(other for other in self.world if other != member)

    def outside(self) -> tuple[str, ...]:
        """List the ready members that are not in the world."""
        return tuple(member for member in self.hosts if member not in self.world)
