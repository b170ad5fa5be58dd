"""Where everything lies: how a value is cut into pieces and blocks, and which place each has. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint.errors import CheckpointError
from checkpoint.redundancy.groups import Group
from checkpoint.redundancy.peers import Place
from checkpoint.store.contract import ByteRange, check_key

BLOCK_BYTES = 4 << 20
_ROOT = "parity/"


@dataclass(frozen=True, slots=True)
class Stripes:
    """The stripes of one group. All of its hosts use the same block size.

    A host's value is cut into k pieces of one length, the last ones shorter or empty; piece `row` is the
    host's data row in one of the stripes. Rows are cut into blocks. Even an empty row has block 0.
    """

    group: Group
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        if self.block_bytes < 1:
            raise CheckpointError(f"blocks of {self.block_bytes} bytes hold nothing")

    def piece(self, value_bytes: int, row: int) -> ByteRange:
        """Return which bytes of a value are in this row."""
        width = -(-value_bytes // self.group.num_data)
        start, stop = (min(number * width, value_bytes) for number in (row, row + 1))
        return ByteRange(start, stop - start)

    def blocks(self, piece: ByteRange) -> list[ByteRange]:
        """Return which bytes of a value are in the blocks of a piece."""
        starts = range(piece.offset, max(piece.stop, piece.offset + 1), self.block_bytes)
        return [ByteRange(start, min(self.block_bytes, piece.stop - start)) for start in starts]

    def place(self, snapshot: str, stripe: int, row: int, block: int) -> Place:
        """Return where a block of a row is kept."""
        return Place(self.group.holder(stripe, row), f"{prefix_of(snapshot)}{stripe}.{row}.{block}")

    def rows_of(self, host: str) -> Iterator[tuple[int, int]]:
        """Yield (row, stripe) for each piece of a host's value."""
        for row in range(self.group.num_data):
            yield row, self.group.stripe_of(host, row)


def prefix_of(snapshot: str) -> str:
    """Return what the names of a snapshot's fragments begin with. Raises StoreError if it is no key."""
    return f"{_ROOT}{check_key(snapshot)}:"


def first_blocks(names: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (snapshot, stripe, row) for every row whose block 0 is among the names: they are whole."""
    for name in names:
        snapshot, _, numbers = name.removeprefix(_ROOT).rpartition(":")
        fields = numbers.split(".")
        if len(fields) == 3 and fields[2] == "0" and fields[0].isdecimal() and fields[1].isdecimal():
            yield snapshot, int(fields[0]), int(fields[1])


def every_name() -> str:
    """Return what the names of all fragments begin with."""
    return _ROOT
