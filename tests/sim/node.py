"""A simulated member's process: what it holds, what it does, and what is wrong with it."""

from dataclasses import dataclass, field
from enum import Enum, auto

from elastic.control.instructions import FormWorld
from elastic.control.standing import BLANK, Standing

LEASE_S = 60.0


class Fault(Enum):
    """What is wrong with a member that lives."""

    STOPPED = auto()  # its process does nothing, and answers nobody
    STUCK = auto()  # its training thread does nothing; the process answers


@dataclass(eq=False)
class Node:
    """A member's process: what it holds, where its training thread is, and what is wrong with it."""

    name: str
    host: str
    standing: Standing = field(default_factory=lambda: Standing(BLANK))
    order: FormWorld | None = None  # the newest, not taken yet
    taken: int = 0
    inside: int = 0
    waiting_at: int = 0
    stop_generation: int = 0
    faults: list[Fault] = field(default_factory=list)
    is_cut_off: bool = False  # from the drivers
    is_isolated: bool = False  # from the other members
    is_evicted: bool = False  # though it may not know
    has_notice: bool = False
    has_raised: bool = False  # its job: it only saves what it holds
    slowness: float = 1.0
    ready_at: float = 0.0
    began_at: float = 0.0
    busy_until: float = 0.0
    heard_at: float = 0.0
    answered_at: float = 0.0
    blemished_at: float = -1e9  # when something was wrong with it last

    is_stuck_working: bool = False  # in a micro-batch
    full_until: float = 0.0  # its arena has no room
    restores_until: float = 0.0

    def is_held_up(self, now: float) -> bool:
        """Whether its training thread waits for the store, or for room."""
        return now < max(self.full_until, self.restores_until)

    @property
    def newest(self) -> int:
        """The newest world it was ordered into."""
        return self.order.generation if self.order else self.taken

    @property
    def is_blank(self) -> bool:
        return self.standing.committed == BLANK

    def is_beyond_help(self, now: float) -> bool:
        """Whether nobody is left who could end it, though it may be stuck for ever."""
        return self.is_orphaned(now) or (self.is_evicted and bool(self.faults))

    def is_sound(self, now: float) -> bool:
        """Whether nothing is wrong with its process and its way to the drivers, or was for a lease."""
        is_whole = not (self.faults or self.is_cut_off or self.is_evicted)
        return is_whole and now - self.blemished_at > LEASE_S

    def is_orphaned(self, now: float) -> bool:
        return now - self.heard_at > LEASE_S

    def working_s(self, now: float) -> float:
        """How long it has been at its micro-batch; 0 if it waits for the others."""
        is_working = self.inside > 0 and (now < self.busy_until or self.is_stuck_working)
        return now - self.began_at if is_working else 0.0
