"""What a scrub finds: of each checkpoint, and of all of them."""

from dataclasses import dataclass, field

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class Bad:
    """Something that is not as it was written: a manifest, a page, a pack, a chunk, a tensor, a receipt.

    `key` is of the object that is to blame; empty if the objects are as they were, but do not add up.
    """

    step: int
    item: str
    why: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of one checkpoint: `num_bad` items are bad, the first thousand of them listed.

    `num_bytes` were read of it: what an earlier one shares with it was not read again. `spare` is damaged as
    well, but no restore needs it: receipts, which hosts told each other before the commit, and sums of
    blocks, without which one that wants parts of chunks reads more; of it, too, a thousand are listed.
    `blamed` are the keys of all objects that are to blame for either, listed or not.
    """

    step: int
    num_tensors: int
    num_chunks: int
    num_bytes: int
    num_bad: int
    bad: tuple[Bad, ...]
    spare: tuple[Bad, ...] = ()
    blamed: frozenset[str] = frozenset()

    @property
    def is_sound(self) -> bool:
        """Whether everything that a restore needs is as it was written."""
        return self.num_bad == 0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read back, the newest checkpoint first, and what is wrong with it.

    `skipped` steps were verified recently enough; `left` ones did not fit the budget. `unrecorded` says why
    the store could not be told what was found, if so.
    """

    checkpoints: tuple[Verified, ...]
    skipped: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    unrecorded: str = ""

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were read back."""
        return tuple(one.step for one in self.checkpoints)

    @property
    def num_tensors(self) -> int:
        """Tensors of all these checkpoints."""
        return sum(one.num_tensors for one in self.checkpoints)

    @property
    def num_chunks(self) -> int:
        """Chunks of all these checkpoints."""
        return sum(one.num_chunks for one in self.checkpoints)

    @property
    def num_bytes(self) -> int:
        """Stored bytes that were read."""
        return sum(one.num_bytes for one in self.checkpoints)

    @property
    def num_bad(self) -> int:
        """Items that are bad."""
        return sum(one.num_bad for one in self.checkpoints)

    @property
    def bad(self) -> tuple[Bad, ...]:
        """The bad items that are listed."""
        return tuple(bad for one in self.checkpoints for bad in one.bad)

    @property
    def spare(self) -> tuple[Bad, ...]:
        """What is damaged, and no restore needs."""
        return tuple(bad for one in self.checkpoints for bad in one.spare)

    @property
    def is_sound(self) -> bool:
        """Whether everything that a restore needs is as it was written."""
        return self.num_bad == 0

    @property
    def bad_steps(self) -> tuple[int, ...]:
        """The steps that have something wrong."""
        return tuple(sorted(one.step for one in self.checkpoints if one.num_bad))


@dataclass(slots=True)
class Tally:
    """What is bad about one checkpoint, or damaged and not needed, so far."""

    step: int
    num_bad: int = 0
    bad: list[Bad] = field(default_factory=list)
    spare: list[Bad] = field(default_factory=list)
    blamed: set[str] = field(default_factory=set)

    def note(self, item: str, why: object, key: str = "") -> None:
        """Count, and list, what is bad."""
        self.num_bad += 1
        self._list(self.bad, Bad(self.step, item, str(why), key))

    def note_spare(self, one: Bad) -> None:
        """List what no restore needs."""
        self._list(self.spare, one)

    def _list(self, listed: list[Bad], one: Bad) -> None:
        self.blamed |= {one.key} - {""}
        if len(listed) < MAX_LISTED:
            listed.append(one)
