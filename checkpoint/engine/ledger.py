"""What one host knows of one snapshot: which of its ranks delivered what, and what was packed. Pure books."""

from dataclasses import dataclass, field
from enum import Enum

from checkpoint.engine.arena import Region
from checkpoint.engine.contract import Content, SnapshotPlan
from checkpoint.format.manifest import ChunkRecord, PackRef

SnapshotId = tuple[int, int]  # generation, step: newer ones compare greater


class Writing(Enum):
    """Whether the trainer may still write into a share's region."""

    OPEN = "open"
    SEALED = "sealed"
    GONE = "gone"


@dataclass(slots=True)
class ShareEntry:
    """One local rank's share: its region, and how far its chunks are."""

    plan: SnapshotPlan
    region: Region
    owner: object
    writing: Writing = Writing.OPEN
    announced: set[int] = field(default_factory=set)
    num_unpacked: int = 0
    is_being_packed: bool = False
    is_released: bool = False


@dataclass(slots=True)
class SnapshotEntry:
    """One snapshot on one host, from the first rank's `open` to its outcome."""

    id: SnapshotId
    run: str
    hosts: tuple[str, ...]
    host: str
    content: Content
    started_s: float
    shares: dict[int, ShareEntry] = field(default_factory=dict)
    chunks: list[ChunkRecord] = field(default_factory=list)
    packs: list[PackRef] = field(default_factory=list)
    num_packs: int = 0
    why_failed: str | None = None
    is_packed: bool = False
    is_live: bool = True

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
    def is_captured(self) -> bool:
        """Whether all local ranks have sealed their shares."""
        return all(
            rank in self.shares and self.shares[rank].writing is Writing.SEALED for rank in self.local_ranks
        )

    @property
    def is_ready_to_end(self) -> bool:
        """Whether every chunk of every local rank went into a pack."""
        return self.is_captured and all(share.num_unpacked == 0 for share in self.shares.values())

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
        """List (once) the regions that neither the trainer writes nor the packer reads any longer."""
        freed = []
        for share in self.shares.values():
            is_done = self.why_failed is not None or share.num_unpacked == 0
            if (
                is_done
                and share.writing is not Writing.OPEN
                and not (share.is_released or share.is_being_packed)
            ):
                share.is_released = True
                freed.append(share.region)
        return freed
