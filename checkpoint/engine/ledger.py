"""What one host knows of one snapshot: which of its ranks delivered what, and what was packed. Pure books."""

from dataclasses import dataclass, field
from enum import Enum

from checkpoint.engine.arena import Region
from checkpoint.engine.contract import Content, Depth, SnapshotPlan
from checkpoint.engine.held import Held
from checkpoint.format.manifest import ChunkRecord

SnapshotId = tuple[int, int]  # generation, step: newer ones compare greater


class Writing(Enum):
    """Whether the trainer may still write into a share's region."""

    OPEN = "open"
    SEALED = "sealed"
    GONE = "gone"


@dataclass(slots=True)
class ShareEntry:
    """One local rank's share: its region, and how far its chunks are.

    `num_needed` announced chunks are still to be read by the pipeline, `num_lent` of them are in its hands.
    What is known of chunks as they lie in the arena is noted in `digests`, if the snapshot is held.
    """

    plan: SnapshotPlan
    region: Region
    owner: object
    writing: Writing = Writing.OPEN
    announced: set[int] = field(default_factory=set)
    num_needed: int = 0
    num_lent: int = 0
    is_released: bool = False
    digests: dict[int, ChunkRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Flight:
    """A pack that the store is being given, and since when, by this process's monotonic clock."""

    num_bytes: int
    begun_s: float


@dataclass(eq=False, slots=True)
class SnapshotEntry:
    """One snapshot on one host, from the first rank's `open` until nothing of it is in the arena.

    It lives until it has its one final outcome. If the host holds snapshots, it `is_held` from its capture on
    until it has to make room, whatever became of it in the store; its `image` says what is in it, once that
    was digested. One that `is_guarded` does not count among those that are to be held.
    """

    id: SnapshotId
    run: str
    hosts: tuple[str, ...]
    host: str
    content: Content
    depth: Depth
    started_s: float
    shares: dict[int, ShareEntry] = field(default_factory=dict)
    why_failed: str | None = None
    is_handed_out: bool = False
    is_live: bool = True
    is_to_be_held: bool = False  # once all local ranks have sealed their shares
    is_held: bool = False
    is_guarded: bool = False
    is_durable: bool = False
    image: Held | None = None
    num_captured: int = 0
    num_readers: int = 0
    flying: dict[str, Flight] = field(default_factory=dict)  # the packs that the store has not whole yet

    @property
    def generation(self) -> int:
        """The generation of the world that took it."""
        return self.id[0]

    @property
    def step(self) -> int:
        """The step of the state."""
        return self.id[1]

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks that live on this host."""
        return tuple(rank for rank, host in enumerate(self.hosts) if host == self.host)

    @property
    def is_alone(self) -> bool:
        """Whether all of its world lives on this host."""
        return set(self.hosts) == {self.host}

    @property
    def is_captured(self) -> bool:
        """Whether all local ranks have sealed their shares."""
        return all(
            rank in self.shares and self.shares[rank].writing is Writing.SEALED for rank in self.local_ranks
        )

    @property
    def has_room(self) -> bool:
        """Whether any of the arena is lent to it."""
        return any(not share.is_released for share in self.shares.values())

    @property
    def is_at_rest(self) -> bool:
        """Whether it is held and digested, and the pipeline has no more use for its bytes."""
        is_needed = self.is_live and any(share.num_needed for share in self.shares.values())
        return self.is_held and self.image is not None and not is_needed

    @property
    def may_leave(self) -> bool:
        """Whether it is at rest, and nobody is reading its bytes just now."""
        return self.is_at_rest and not (self.num_readers or any(one.num_lent for one in self.shares.values()))

    @property
    def flights(self) -> tuple[Flight, ...]:
        """The packs that the store is being given just now."""
        return tuple(self.flying.copy().values())  # writers come and go meanwhile

    def missing(self) -> str:
        """Say which local ranks have not delivered."""
        late = [
            rank
            for rank in self.local_ranks
            if rank not in self.shares or self.shares[rank].writing is not Writing.SEALED
        ]
        return (
            f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))} of {self.host} did not deliver"
        )

    def releasable(self) -> list[Region]:
        """List (once) the regions that nobody writes, reads, waits for or holds any longer."""
        is_awaited = self.is_to_be_held and self.why_failed is None and not self.is_captured
        if self.is_held or is_awaited or self.num_readers:
            return []
        freed = []
        for share in self.shares.values():
            is_done = share.num_lent == 0 and (self.why_failed is not None or share.num_needed == 0)
            if is_done and share.writing is not Writing.OPEN and not share.is_released:
                share.is_released = True
                freed.append(share.region)
        return freed
