"""What a conversion is given, and what it tells: tensors, settings, progress, the report. Data only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from numpy.typing import NDArray

from checkpoint.engine.plan import TensorSpec
from checkpoint.format.box import Box
from checkpoint.format.codec import Codec

Array = NDArray[Any]
Wish = tuple[int, Box]  # a box of a tensor, by its number

READ_BYTES = 32 << 20  # what a reader holds besides its result: the least that a restore needs
_MIN_BUDGET_BYTES = 128 << 20
_MOST_BATCH_BYTES = 64 << 20
_PACK_BYTES = (4 << 20, 64 << 20)


class GlobalTensors(Protocol):
    """Whole tensors, of which any box can be had, wherever and however they are stored. Thread-safe."""

    @property
    def tensors(self) -> Sequence[TensorSpec]:
        """The tensors, in an order that `read` counts in."""

    def read(self, wishes: Sequence[Wish]) -> list[Array]:
        """Return the bits of boxes, row by row, in their dtypes' carriers; best asked for together."""


class Numbering(Enum):
    """How it is told whose the states of an optimizer are that numbers its parameters."""

    TOLD = "told"  # by names, or by shapes that leave no choice
    BY_ORDER = "by order"  # people say that it numbers them in the model's order


class Overflow(Enum):
    """What becomes of a conversion whose casts turn numbers into infinities."""

    REFUSED = "refused"
    ALLOWED = "allowed"  # and noted


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: raw bytes that are done, of all; `what` names the work at hand."""

    what: str
    num_done_bytes: int
    num_bytes: int


Listener = Callable[[Progress], None]


def unheard(_: Progress) -> None:
    """Listen to nothing."""


@dataclass(frozen=True, slots=True)
class ConversionSettings:
    """How a conversion works: in how much memory, with how many threads, how chunks are stored, how it casts.

    What it holds at a time, besides indices, stays within `budget_bytes`: each thread reads, and holds a
    batch raw and encoded; one batch waits; one pack is filled while another is written.
    """

    budget_bytes: int = 1 << 30
    num_threads: int = 2
    codec: Codec = Codec.PLANES
    level: int = 1
    overflow: Overflow = Overflow.REFUSED

    def __post_init__(self) -> None:
        if self.num_threads < 1 or self.budget_bytes < _MIN_BUDGET_BYTES:
            raise ValueError(
                f"a conversion needs a thread and a memory budget of at least {_MIN_BUDGET_BYTES >> 20} MiB, "
                f"not {self.num_threads} and {self.budget_bytes >> 20} MiB"
            )

    @property
    def num_workers(self) -> int:
        """How many threads read and encode: no more than the budget has room for."""
        return min(self.num_threads, self.budget_bytes // (2 * READ_BYTES))

    @property
    def pack_bytes(self) -> int:
        """How large packs become."""
        return max(_PACK_BYTES[0], min(self.budget_bytes // 16, _PACK_BYTES[1]))

    @property
    def batch_bytes(self) -> int:
        """How many raw bytes are worked on together by one thread."""
        rest = self.budget_bytes - self.num_workers * READ_BYTES - 2 * self.pack_bytes
        return min(rest // (2 * self.num_workers + 1), _MOST_BATCH_BYTES)

    @property
    def peak_bytes(self) -> int:
        """The most that is held at a time."""
        batches = (2 * self.num_workers + 1) * self.batch_bytes
        return self.num_workers * READ_BYTES + batches + 2 * self.pack_bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """Why a tensor of the target is believed.

    "fingerprint": its content fingerprint is that of the source's tensor. "reference": its values were
    changed on purpose, and the fingerprint is that of the change applied anew by other, simpler code.
    """

    name: str
    how: str
    fingerprint: int


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did, or, if `is_dry`, would do: then what is written is a bound, or `is_exact`.

    `num_resumed_bytes` (raw) were found done by an earlier attempt that was cut off. `is_new` is false if the
    very checkpoint was there already. `peak_bytes` is the account of buffers, `grown_bytes` by how much the
    process's high-water mark rose.
    """

    source: str
    target: str
    step: int
    layout: str
    num_tensors: int
    num_chunks: int
    num_bytes: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    grown_bytes: int = 0
    num_resumed_bytes: int = 0
    seconds: float = 0.0
    is_new: bool = True
    is_dry: bool = False
    is_exact: bool = True
    proofs: tuple[Proof, ...] = ()
    notes: tuple[str, ...] = ()
