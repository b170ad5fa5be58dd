"""Which rank holds which rows of every sharded tensor, and what moves in a new world. Pure."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """One of `shards` equal parts of a tensor's rows; the last are shorter, or empty, as in torch.chunk."""

    shards: int
    index: int

    def rows(self, num_rows: int) -> range:
        """Return the rows of this part."""
        length = -(-num_rows // self.shards)
        start, stop = length * self.index, length * (self.index + 1)
        return range(min(start, num_rows), min(stop, num_rows))


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Replicas x shards, of any number of ranks: the rank at place p of `order` holds shard p mod `shards`.

    The ranks at places k x `shards` and following are team k, which together hold everything once. The last
    team may lack some: its ranks are given those by other teams.
    """

    shards: int
    order: tuple[int, ...]

    def cut(self, rank: int) -> Cut:
        """Return what a rank holds."""
        return Cut(self.shards, self.order.index(rank) % self.shards)

    def source(self, rank: int, shard: int) -> int:
        """Return the rank that gives a shard to another rank when all are gathered."""
        place = self.order.index(rank)
        if place % self.shards == shard:
            return rank
        near = place // self.shards * self.shards + shard
        num_teams = len(self.order) // self.shards
        return self.order[near if near < len(self.order) else place % num_teams * self.shards + shard]


@dataclass(frozen=True, slots=True)
class Move:
    """The rows from `start` to before `stop` of tensor `number`."""

    number: int
    start: int
    stop: int


def arrange(hosts: Sequence[str], copies: int) -> Arrangement:
    """Make as many shards as leave each at least `copies` holders (or all ranks), if possible on other hosts.

    A host's ranks are neighbours in the order, so that up to `shards` of them hold different shards.
    """
    order = tuple(sorted(range(len(hosts)), key=lambda rank: (hosts[rank], rank)))
    return Arrangement(max(1, len(hosts) // copies), order)


def lost_tensors(num_rows: Sequence[int], held: Sequence[Cut | None]) -> list[int]:
    """List the tensors of which no rank has some of the rows any more."""
    return [number for number, length in enumerate(num_rows) if not _is_whole(length, held)]


def plan_moves(
    num_rows: Sequence[int], held: Sequence[Cut | None], wanted: Sequence[Cut]
) -> dict[tuple[int, int], list[Move]]:
    """List what each (sender, receiver) moves, so that every rank comes to hold what it wants.

    What a rank holds already stays there; of several holders the one that sent least sends. Every wanted row
    has a holder.
    """
    sent = [0] * len(held)
    found: dict[tuple[int, int], list[Move]] = defaultdict(list)
    for number, length in enumerate(num_rows):
        having = [range(0) if cut is None else cut.rows(length) for cut in held]
        for receiver, cut in enumerate(wanted):
            for gap in _without(cut.rows(length), having[receiver]):
                for sender, piece in _cover(gap, having, sent):
                    found[sender, receiver].append(Move(number, piece.start, piece.stop))
    return dict(found)


def _is_whole(num_rows: int, held: Sequence[Cut | None]) -> bool:
    """Return whether the ranks hold all rows of a tensor together."""
    start = 0
    for rows in sorted(
        (cut.rows(num_rows) for cut in held if cut is not None), key=lambda rows: (rows.start, rows.stop)
    ):
        if rows.start <= start:
            start = max(start, rows.stop)
    return start >= num_rows


def _without(wanted: range, own: range) -> Iterator[range]:
    """Yield what is left of a range without another one."""
    before = range(wanted.start, max(wanted.start, min(wanted.stop, own.start)))
    after = range(min(wanted.stop, max(wanted.start, own.stop)), wanted.stop)
    yield from (part for part in ((before, after) if own else (wanted,)) if part)


def _cover(gap: range, having: Sequence[range], sent: list[int]) -> Iterator[tuple[int, range]]:
    """Yield who sends which piece of a gap, and note it."""
    start = gap.start
    while start < gap.stop:
        sender = min(
            (rank for rank, rows in enumerate(having) if start in rows), key=lambda rank: (sent[rank], rank)
        )
        piece = range(start, min(gap.stop, having[sender].stop))
        sent[sender] += len(piece)
        yield sender, piece
        start = piece.stop
