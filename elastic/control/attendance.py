"""How far the members of a world have come since it was ordered. Pure bookkeeping.

What one member tells says something of the others: none connects before all have come, and none commits a
step before all hold the state. So a message that got lost holds nobody up.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from elastic.control.events import (
    Ending,
    MemberCame,
    MemberEnded,
    Settled,
    StepCommitted,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import Manner

OfWorld = MemberCame | WorldFormed | WorldBroken | Settled | StepCommitted | MemberEnded


class Stage(Enum):
    """What a world is waiting for."""

    COMING = "its members to come"
    CONNECTING = "its members to connect"
    SETTLING = "its members to hold one state"
    TRAINING = "the next step"
    ENDING = "the last checkpoint"


@dataclass(slots=True)
class Attendance:
    """Who of a world's members, in their `ranks`, has told what, and when anybody told anything last.

    `holders` are those known to hold the state as it was ordered; none, if that is known of nobody. `origin`
    says where those who lack the state get it from: "self" (nobody does), "survivors" (nor does anybody, but
    for what those held who are not there any more), "peer" or "store". Until it comes, those `before` make
    steps, or end their micro-batches. It `is_closing` once nothing but the last checkpoint is left to do.
    """

    ranks: tuple[str, ...] = ()
    manner: Manner = Manner.AT_ONCE
    origin: str = "store"
    holders: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    last_step: int = 1 << 62
    ordered_at: float = 0.0
    broken_at: float | None = None
    why_broken: str = ""
    is_closing: bool = False
    members: frozenset[str] = field(init=False)
    moved_at: float = field(init=False)
    ended: dict[str, Ending] = field(default_factory=dict)
    _came: set[str] = field(default_factory=set)
    _formed: set[str] = field(default_factory=set)
    _settled: set[str] = field(default_factory=set)
    _has_stepped: bool = False

    def __post_init__(self) -> None:
        self.members, self.moved_at = frozenset(self.ranks), self.ordered_at

    def succeed(
        self, ranks: tuple[str, ...], manner: Manner, origin: str, holders: frozenset[str], *, now: float
    ) -> "Attendance":
        """Begin that of the next world, which is ordered now."""
        before = self.members if self.has_settled else self.before
        return Attendance(ranks, manner, origin, holders, before, self.last_step, now)

    def take(self, event: OfWorld, now: float) -> None:
        """Take in what a member of this world tells."""
        if event.member not in self.members:
            return
        match event:
            case MemberCame(member=member):
                self._came.add(member)
            case WorldFormed(member=member):
                self._formed.add(member)
            case Settled(member=member, step=step):
                self._settled.add(member)
                self.is_closing = self.is_closing or step >= self.last_step
            case StepCommitted(step=step, is_last=is_last):
                self._has_stepped = True
                self.is_closing = self.is_closing or is_last or step >= self.last_step
            case MemberEnded(member=member, ending=ending) if ending is not Ending.REGROUP:
                self.ended[member] = ending
            case WorldBroken(evidence=why):
                self.broken_at = self.broken_at if self.broken_at is not None else now
                self.why_broken = why
                return  # it is no move
        self.moved_at = now

    @property
    def stage(self) -> Stage:
        """What this world is waiting for."""
        size = len(self.members)
        if self.ended or (self.is_closing and self.has_settled):
            return Stage.ENDING
        if self.has_settled:
            return Stage.TRAINING
        if self._settled or len(self._formed) == size:
            return Stage.SETTLING
        return Stage.CONNECTING if self._formed or len(self._came) == size else Stage.COMING

    @property
    def has_settled(self) -> bool:
        """Whether all are known to hold the state."""
        return self._has_stepped or len(self._settled) == len(self.members)

    @property
    def has_begun(self) -> bool:
        """Whether anybody is known to have come to the state; the others may hold it too."""
        return self._has_stepped or bool(self._settled)

    @property
    def holding(self) -> frozenset[str]:
        """Who may be the only ones to hold the state."""
        return self.members if self.has_settled else self.holders & self.members or self.members

    @property
    def stepping(self) -> frozenset[str]:
        """Who may be at a micro-batch: until this world has come, members of the one that trained last."""
        if self.stage is Stage.COMING:
            return self.before
        return self.members

    @property
    def came(self) -> Collection[str]:
        """Who is known to have come."""
        return self._came

    @property
    def late(self) -> frozenset[str]:
        """Who has not come; nobody, once it is known that all have."""
        return self.members - self._came if self.stage is Stage.COMING else frozenset()

    def have_ended(self, members: Collection[str]) -> bool:
        """Whether all of these, and there are some, have ended in good order."""
        return 0 < len(members) <= len(self.ended) and self.ended.keys() >= set(members)
