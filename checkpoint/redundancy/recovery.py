"""Recovers one host's value: block by block from where it is, or rebuilt from any k rows of its stripe."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from checkpoint.errors import Corrupt, Unrecoverable
from checkpoint.redundancy.codes import Code, code_of
from checkpoint.redundancy.fragment import Fragment, Share, Whole, decode_fragment, is_of, whole_of
from checkpoint.redundancy.peers import Peers, Place
from checkpoint.redundancy.stripes import Stripes
from checkpoint.store.contract import Buffer, ByteRange

Allocate = Callable[[int], Buffer]
_MAX_KEPT_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Recovered:
    """A host's value, how many bytes of it had to be rebuilt, and which fragments were damaged."""

    value: memoryview
    num_rebuilt_bytes: int
    bad: tuple[str, ...]


def recover(
    peers: Peers, stripes: Stripes, *, host: str, snapshot: str, allocate: Allocate = bytearray
) -> Recovered:
    """Return the value that a host had offered, bit for bit, from what is left of its group.

    The value is written into the buffer that `allocate` returns for its length. A fragment that is damaged,
    or of another value, counts as lost. Raises Unrecoverable if more is lost than the parity makes up for.
    """
    recovery = Recovery(peers, stripes, host=host, snapshot=snapshot)
    value = memoryview(allocate(recovery.whole.num_bytes)).cast("B")
    recovery.read_into(value, 0)
    if whole_of(value) != recovery.whole:
        raise Corrupt(f"what was recovered of {host}'s snapshot {snapshot} is not what {host} had offered")
    return Recovered(value, recovery.num_rebuilt_bytes, recovery.bad)


class Recovery:
    """One host's value of a snapshot, read piece by piece from what is left of its group. Thread-safe.

    Every block is proved by the checksum that its host, or a parity over it, tells. Raises Unrecoverable if
    more is lost than the parity makes up for.
    """

    def __init__(self, peers: Peers, stripes: Stripes, *, host: str, snapshot: str) -> None:
        code = code_of(stripes.group.num_data, stripes.group.num_parity)
        self._search = _Search(peers, stripes, snapshot, code)
        self._stripes = stripes
        self._host = host
        self.whole = self._search.whole_of(host)
        self.num_rebuilt_bytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Buffer] = OrderedDict()  # by where they begin; the last ones used

    @property
    def bad(self) -> tuple[str, ...]:
        """The names of the fragments that were found damaged."""
        return tuple(sorted(self._search.bad))

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill memory with the value's bytes from an offset on."""
        stop = offset + memory.nbytes
        place = offset
        while place < stop:
            part, block = self._block_at(place)
            upto = min(part.stop, stop)
            found = memoryview(block)[place - part.offset : upto - part.offset]
            memory[place - offset : upto - offset] = found
            place = upto

    def _block_at(self, offset: int) -> tuple[ByteRange, Buffer]:
        """Return the block that holds a byte of the value, and which bytes those are."""
        stripes, group = self._stripes, self._stripes.group
        row = offset // stripes.piece(self.whole.num_bytes, 0).num_bytes
        piece = stripes.piece(self.whole.num_bytes, row)
        number = (offset - piece.offset) // stripes.block_bytes
        part = stripes.blocks(piece)[number]
        with self._lock:
            kept = self._kept.get(part.offset)
        if kept is None:
            kept = self._found(row, group.stripe_of(self._host, row), number, part)
            with self._lock:
                self._kept[part.offset] = kept
                while len(self._kept) > _MAX_KEPT_BLOCKS:
                    self._kept.popitem(last=False)
        return part, kept

    def _found(self, row: int, stripe: int, number: int, part: ByteRange) -> Buffer:
        """Fetch a block from where it is, or rebuild it."""
        kept = self._search.fragments(stripe, [row], number).get(row)
        if kept is not None and kept.shares[0].whole == self.whole:
            return kept.payload
        found = self._search.rebuilt(stripe, row, number, self.whole)
        with self._lock:
            self.num_rebuilt_bytes += part.num_bytes
        return found


@dataclass(slots=True)
class _Search:
    """One recovery on its way: where it looks, and what it found damaged."""

    peers: Peers
    stripes: Stripes
    snapshot: str
    code: Code
    bad: set[str] = field(default_factory=set)

    def whole_of(self, host: str) -> Whole:
        """Return what the host's value was, from its own fragments or from any parity over them."""
        group = self.stripes.group
        parities = range(group.num_data, len(group.hosts))
        for row, stripe in self.stripes.rows_of(host):
            for found, fragment in self.fragments(stripe, [row, *parities], 0).items():
                return fragment.shares[0 if found == row else row].whole
        raise Unrecoverable(
            f"nothing is left of {host}'s snapshot {self.snapshot} in its group: restore from a farther tier"
        )

    def fragments(self, stripe: int, rows: Sequence[int], block: int) -> dict[int, Fragment]:
        """Fetch a block of these rows: those that are there and good."""
        places = [self.stripes.place(self.snapshot, stripe, row, block) for row in rows]
        found = zip(rows, places, self.peers.fetch(places), strict=True)
        fragments = ((row, self._good(place, data)) for row, place, data in found if data is not None)
        return {row: fragment for row, fragment in fragments if fragment is not None}

    def rebuilt(self, stripe: int, row: int, block: int, whole: Whole) -> Buffer:
        """Return a block of a row from k others, fetching no more than it takes."""
        group = self.stripes.group
        first_parity = group.num_data  # asked first: it tells what the others should be
        others = [other for other in range(len(group.hosts)) if other not in (row, first_parity)]
        candidates = [first_parity, *others]
        good: dict[int, Fragment] = {}
        shares: tuple[Share, ...] = ()
        present: dict[int, Buffer] = {}
        while candidates and len(present) < group.num_data:
            num_wanted = group.num_data - len(present)
            asked, candidates = candidates[:num_wanted], candidates[num_wanted:]
            good |= self.fragments(stripe, asked, block)
            shares, present = self._agreeing(good)
        if len(present) < group.num_data or shares[row].whole != whole:
            raise Unrecoverable(
                f"snapshot {self.snapshot} has lost row {row} of stripe {stripe} (block {block}): "
                f"{len(present)} good rows are left, {group.num_data} are needed; restore from a farther tier"
            )
        found = self.code.rebuild(present, {row: shares[row].num_bytes})[row]
        if not is_of(shares[row], found):
            raise Corrupt(f"row {row} of stripe {stripe} of snapshot {self.snapshot} was not rebuilt right")
        return found

    def _agreeing(self, good: Mapping[int, Fragment]) -> tuple[tuple[Share, ...], dict[int, Buffer]]:
        """Return what a parity says that the data rows are, and the bytes of all rows that agree with it."""
        num_data = self.stripes.group.num_data
        parities = [fragment for row, fragment in sorted(good.items()) if row >= num_data]
        if not parities:
            return (), {}
        shares = parities[0].shares
        present: dict[int, Buffer] = {row: b"" for row, share in enumerate(shares) if not share.num_bytes}
        for row, fragment in good.items():
            if fragment.shares == (shares if row >= num_data else (shares[row],)):
                present[row] = fragment.payload
        return shares, present

    def _good(self, place: Place, data: Buffer) -> Fragment | None:
        try:
            return decode_fragment(place.name, data)
        except Corrupt:
            self.bad.add(place.name)
            return None
