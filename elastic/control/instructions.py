"""What to do (instructions), as values. The controller makes them; the driver carries them out."""

from dataclasses import dataclass
from enum import Enum, StrEnum

from elastic.control.events import Cause


class Manner(Enum):
    """How members leave the world they are in."""

    AT_ONCE = "at once"
    AT_BOUNDARY = "at the next step boundary"


class Status(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StartMember:
    """Start a process that may become a rank."""

    member: str


@dataclass(frozen=True, slots=True)
class KillMember:
    """End a member that hangs, that its peers cannot reach, or whose machine or memory cannot be trusted;
    `cause` says which.
    """

    member: str
    reason: str
    cause: Cause = Cause.HUNG


@dataclass(frozen=True, slots=True)
class ReleaseMember:
    """End a member that no world needs any more; it has handed over what it held."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class FormWorld:
    """Form the world of `generation`: `members` in rank order, on `hosts` (same order).

    One that `only_saves` makes no step: it comes to one state, saves that and ends. Nor does one with members
    that are `leaving`: these give the shards of the state that they hold to the others, and all end.
    """

    generation: int
    members: tuple[str, ...]
    hosts: tuple[str, ...]
    manner: Manner
    reason: str
    only_saves: bool = False
    leaving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StopWorld:
    """Commit a final checkpoint at the next step boundary and end."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """The run is over."""

    status: Status
    reason: str


Instruction = StartMember | KillMember | ReleaseMember | FormWorld | StopWorld | End
