"""Who is there: members by what they are doing, in the order they came. Pure bookkeeping.

Every change costs the same however many members there are, but for those of the world, which cost its size.
"""

from collections.abc import Iterable, KeysView
from dataclasses import dataclass, field


@dataclass(slots=True)
class Membership:
    """Members that are starting, members that are ready (with their hosts), and the world's members in rank
    order.

    Member names are never reused, so a lost one that speaks again is known to be a stranger.
    """

    prefix: str
    hosts: dict[str, str] = field(default_factory=dict)
    world: tuple[str, ...] = ()
    num_named: int = 0
    _starting: dict[str, None] = field(default_factory=dict)
    _outside: dict[str, None] = field(default_factory=dict)
    _ranked: frozenset[str] = frozenset()

    def expect(self, members: Iterable[str]) -> None:
        """Count members as starting."""
        self._starting.update(dict.fromkeys(members))

    def name_next(self) -> str:
        """Name a member that is about to start."""
        while self.knows(member := f"{self.prefix}{self.num_named}"):
            self.num_named += 1  # an earlier driver that claimed nothing yet used the same prefix
        self.num_named += 1
        self._starting[member] = None
        return member

    def admit(self, member: str, host: str) -> None:
        """Count a member as ready; one that another driver started is welcome too."""
        self._starting.pop(member, None)
        self.hosts[member] = host
        if member not in self._ranked:
            self._outside[member] = None

    def knows(self, member: str) -> bool:
        """Say whether this member is starting or ready."""
        return member in self.hosts or member in self._starting

    def drop(self, member: str) -> None:
        """Forget a lost member; the world keeps the others in their order."""
        self._starting.pop(member, None)
        self._outside.pop(member, None)
        self.hosts.pop(member, None)
        if member in self._ranked:
            self.world = tuple(other for other in self.world if other != member)
            self._ranked -= {member}

    def rank(self, members: tuple[str, ...]) -> None:
        """Make ready members the world, in this order of ranks."""
        self.world, self._ranked = members, frozenset(members)
        self._outside = {member: None for member in self.hosts if member not in self._ranked}

    def is_ranked(self, member: str) -> bool:
        """Say whether this member is in the world."""
        return member in self._ranked

    @property
    def starting(self) -> KeysView[str]:
        """The members that are starting."""
        return self._starting.keys()

    @property
    def outside(self) -> KeysView[str]:
        """The ready members that are not in the world."""
        return self._outside.keys()
