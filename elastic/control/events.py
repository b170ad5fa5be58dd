"""What happened (events), as values.

Members and the driver make them; the controller and the journal read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from elastic.control.standing import BLANK


class Cause(StrEnum):
    """Why a member was lost."""

    PROCESS_DIED = "process died"
    HOST_DIED = "host died"
    HUNG = "hung"
    CUT_OFF = "cut off"
    FAILED = "worker failed"
    START_FAILED = "start failed"


class Ending(StrEnum):
    """How a member's training in one world ended, when nothing broke."""

    FINISHED = "finished"
    STOPPED = "stopped"
    REGROUP = "regroup"


@dataclass(frozen=True, slots=True)
class MemberReady:
    """A member's process is up and can be given a rank. `host` names its machine.

    `step` counts the committed steps of the state that it holds as it says so (`BLANK`: it holds none), and
    `generation` is that of the newest world it was ordered into (0: none).
    """

    member: str
    host: str
    pid: int
    step: int = BLANK
    generation: int = 0


@dataclass(frozen=True, slots=True)
class MemberBuilding:
    """A member that a new driver greets still makes its dataset or model: it has been in no world."""

    member: str


@dataclass(frozen=True, slots=True)
class MemberLost:
    """A member is gone for good; `evidence` says how that was noticed."""

    member: str
    cause: Cause
    evidence: str


@dataclass(frozen=True, slots=True)
class WorldBroken:
    """A member saw a collective of this generation fail and has left its process group.

    If it `is_blank` it holds no state now: it never did, or gave it up. Where the world could not connect it
    has looked whom of it is `unreachable` from here (None: it has not looked).
    """

    member: str
    generation: int
    evidence: str
    is_blank: bool = False
    unreachable: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class WorldCalledOff:
    """A member knows that its world of this generation is over; it leaves once its micro-batch has ended."""

    member: str
    generation: int


@dataclass(frozen=True, slots=True)
class MemberCame:
    """A member has left whatever it was in, and is on its way to the world of this generation."""

    member: str
    generation: int


@dataclass(frozen=True, slots=True)
class WorldFormed:
    """A member has joined the process group of this generation, `seconds` after it was told to."""

    member: str
    generation: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Settled:
    """A member holds the world's state: `step` committed steps, got from `source` in `seconds`.

    `source` is "fresh" (the seed), "self", "peer" (another rank), or where the restored bytes were, nearest
    first: "memory" (the host's), "peers" (other hosts'), "parity", "store", a further tier's name; joined by
    +. `note` tells what a person should know (a fallback, say).
    """

    member: str
    generation: int
    step: int
    source: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """All ranks of the world applied a step; `step` counts the committed steps. Times are in seconds.

    After one that `is_last`, as they were told to stop, they save and end.
    """

    member: str
    generation: int
    step: int
    loss: float
    seconds: float
    tokens: int
    blocked_s: float
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointCaptured:
    """A member's share of the snapshot at `step` is in its keeper's arena (not durable); the loop waited
    `blocked_s`.
    """

    member: str
    generation: int
    step: int
    blocked_s: float


@dataclass(frozen=True, slots=True)
class CheckpointDurable:
    """The checkpoint at `step` exists on `tier`."""

    member: str
    generation: int
    step: int
    tier: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointLost:
    """The snapshot at `step` did not become a checkpoint (failed, torn, or skipped because the arena was
    full).
    """

    member: str
    generation: int
    step: int
    why: str


@dataclass(frozen=True, slots=True)
class ReplicaHealed:
    """A member's state differed from the majority's in some tensors, and was replaced by a good replica."""

    member: str
    generation: int
    step: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """Nothing of a step was applied, though it counts as committed: something of it was not finite."""

    member: str
    generation: int
    step: int
    why: str


@dataclass(frozen=True, slots=True)
class LossJumped:
    """The loss of a step was far above the `usual` one."""

    member: str
    generation: int
    step: int
    loss: float
    usual: float


@dataclass(frozen=True, slots=True)
class UserFailed:
    """The job or its data cannot be trained as they are; that would be so elsewhere too, so it is not
    retried.
    """

    member: str
    generation: int
    step: int
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """A member cannot go on for a reason of its machine (no keeper, no room, no port); another may be able
    to.
    """

    member: str
    evidence: str


@dataclass(frozen=True, slots=True)
class MemberEnded:
    """A member left the loop in good order at `step`; `weights_sha256` is set when it finished or stopped."""

    member: str
    generation: int
    step: int
    ending: Ending
    weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class MemberLeaving:
    """A member was told that its process or its machine will be taken away soon (`notice`: who said so)."""

    member: str
    notice: str


@dataclass(frozen=True, slots=True)
class GenerationTaken:
    """The generation just ordered was taken by a worker that had lost its driver, and saved alone."""

    generation: int


@dataclass(frozen=True, slots=True)
class WorkersWanted:
    """Somebody asked for another number of workers at full strength."""

    workers: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody (a person, a cancelled flow run) asked for a clean end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; `silence_s` tells how long ago each member answered last, `working_s` how long each has
    been at its present micro-batch (0: it is at none, or at its first). The `waiting` ones can do nothing
    before there is room in their hosts' arenas.
    """

    silence_s: Mapping[str, float] = field(default_factory=dict)
    working_s: Mapping[str, float] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SegmentStarted:
    """A driver took the run up: `num_steps` is its aim, `wall_s` the unix time, `generation` the newest one
    claimed before.
    """

    num_steps: int
    generation: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class FaultStruck:
    """A drill broke `member` on purpose, with `step` steps committed."""

    member: str
    step: int


@dataclass(frozen=True, slots=True)
class StacksKept:
    """What a silent member was doing is written down in `file`, in the run's directory."""

    member: str
    file: str


@dataclass(frozen=True, slots=True)
class SegmentEnded:
    """The driver let go of the run, for `reason`."""

    status: str
    reason: str


Event = (
    MemberReady
    | MemberBuilding
    | MemberLost
    | WorldBroken
    | WorldCalledOff
    | MemberCame
    | WorldFormed
    | Settled
    | StepCommitted
    | CheckpointCaptured
    | CheckpointDurable
    | CheckpointLost
    | ReplicaHealed
    | StepSkipped
    | LossJumped
    | UserFailed
    | MemberFailed
    | MemberEnded
    | MemberLeaving
    | GenerationTaken
    | WorkersWanted
    | StopRequested
    | Tick
)
Entry = Event | SegmentStarted | FaultStruck | StacksKept | SegmentEnded
