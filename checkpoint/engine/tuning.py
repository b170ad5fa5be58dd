"""How a pipeline is set up: sizes, threads, patience."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes and patience, which is shorter once a newer world exists.

    Other hosts then have `fenced_patience_s` to bring their receipts, ranks of this host `straggler_s` to
    deliver. A store that cannot be reached is asked again for `outage_s`, beyond what its own wrapper tries;
    meanwhile snapshots wait in the arena. The first packs of a snapshot are smaller than `pack_bytes`, so
    that the store has something to do early.
    """

    pack_bytes: int = 64 << 20
    first_pack_bytes: int = 8 << 20
    num_encoders: int = 2
    num_writers: int = 4
    poll_s: float = 0.25
    patience_s: float = 600.0
    fenced_patience_s: float = 15.0
    straggler_s: float = 3.0
    outage_s: float = 600.0
    tier: str = "store"

    @property
    def num_packs_in_memory(self) -> int:
        """One being filled, one waiting, and those being written."""
        return 2 + self.num_writers
