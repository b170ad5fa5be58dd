"""What a saver asks of whoever keeps its snapshots, and what it is told of them later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from checkpoint.engine.plan import TensorSpec
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box

MEMORY = "memory"  # the tier that a host's own memory is
PARITY = "parity"  # the tier that several hosts' memories are together
Depth = Literal["store", "memory"]  # how far a snapshot goes; "memory": held by its host, never written out


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """One rank's share of one snapshot: what every message about it carries."""

    run: str
    generation: int
    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A chunk's place in a share's region of the arena: contiguous elements of `box` from `offset` on."""

    tensor: int
    box: Box
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Content:
    """What is in a snapshot, the same on every rank: its tensors, and the state's skeleton as JSON text."""

    tensors: tuple[TensorSpec, ...]
    skeleton: str
    digest: str


@dataclass(frozen=True, slots=True)
class Handling:
    """How a snapshot is treated on its way: compression, and what to do while the arena has no room.

    With a `delta_chain` a changed chunk may be stored as what differs from the one before, which itself may
    be stored so, up to that many in a row; 0 stores every chunk in full.
    """

    codec: Codec
    level: int
    when_full: Literal["wait", "skip"]
    max_wait_s: float
    depth: Depth = "store"
    delta_chain: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """One rank's share: `hosts[r]` is the host of rank r; `slots` are the chunks that this rank captures."""

    hosts: tuple[str, ...]
    content: Content
    meta: Mapping[str, Any]
    handling: Handling
    slots: tuple[Slot, ...]

    @property
    def num_bytes(self) -> int:
        """Room the share takes in the arena."""
        return self.slots[-1].offset + self.slots[-1].num_bytes if self.slots else 0


@dataclass(frozen=True, slots=True)
class Durable:
    """The checkpoint of `step` exists on `tier`: `num_bytes` stored, `seconds` after its capture began.

    Tier "memory" is the host that holds the snapshot; "parity" the hosts of its world, some of which may now
    be lost. What was saved at depth "store" is final only once it is durable on the nearest store; news of
    memory, parity and far tiers come besides, before or after that.
    """

    step: int
    generation: int
    tier: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The snapshot of `step` will not become a checkpoint through this host; nothing of it counts.

    With the name of a far `tier`, or of parity, only what was to be there failed.
    """

    step: int
    generation: int
    why: str
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """The snapshot of `step` was not taken, because the arena was full."""

    step: int
    generation: int
    why: str


Outcome = Durable | Failed | Skipped


# Told across hosts as a part of the reason, and so a text: nothing is wrong, the next one has its turn.
OVERTAKEN = "newer snapshots overtook it"


def is_final(outcome: Outcome, depth: Depth) -> bool:
    """Whether an outcome is a snapshot's own; others tell of memory, of parity and of far tiers besides."""
    match outcome:
        case Durable(tier=tier):
            return tier != PARITY and (tier == MEMORY) == (depth == "memory")
        case Failed(tier=tier):
            return not tier
        case Skipped():
            return True


@dataclass(frozen=True, slots=True)
class Pressure:
    """How tight a host's memory has been since it started.

    Of `arena_bytes`, at most `most_bytes` were lent at a time. Shares waited `num_waits` times for room,
    `waited_s` in all; `num_skipped` snapshots were given up for want of it. `num_bare` times the newest
    snapshot held in memory had to go before the next one was whole: then memory held none.
    """

    arena_bytes: int
    most_bytes: int = 0
    num_waits: int = 0
    waited_s: float = 0.0
    num_skipped: int = 0
    num_bare: int = 0


class Host(Protocol):
    """Keeps the snapshots of the ranks of one host. Every method may raise KeeperLost."""

    def open(self, ticket: Ticket, plan: SnapshotPlan) -> memoryview | None:
        """Lend arena space for a share; None when the snapshot is not taken (an outcome says why).

        Waits while the arena is full, as the plan's handling says.
        """

    def ready(self, ticket: Ticket, chunk_index: int) -> None:
        """Say that a slot's bytes are in: they may be packed from now on."""

    def seal(self, ticket: Ticket) -> None:
        """Say that all slots are in and the snapshot was not torn: it is captured."""

    def spoil(self, ticket: Ticket, why: str) -> None:
        """Say that the share must not be used; its snapshot fails on every host."""

    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what became known since this was last asked, without waiting."""
