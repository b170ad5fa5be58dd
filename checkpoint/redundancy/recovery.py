"""Recovers one host's value: block by block from where it is, or rebuilt from any k rows of its stripe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from checkpoint.errors import Corrupt, Unrecoverable
from checkpoint.redundancy.codes import Code, code_of
from checkpoint.redundancy.fragment import Fragment, Share, Whole, decode_fragment, whole_of
from checkpoint.redundancy.peers import Peers, Place
from checkpoint.redundancy.stripes import Stripes
from checkpoint.store.contract import Buffer

Allocate = Callable[[int], Buffer]


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
    search = _Search(peers, stripes, snapshot, code_of(stripes.group.num_data, stripes.group.num_parity))
    whole = search.whole_of(host)
    value = memoryview(allocate(whole.num_bytes)).cast("B")
    num_rebuilt_bytes = 0
    for row, stripe in stripes.rows_of(host):
        for block, part in enumerate(stripes.blocks(stripes.piece(whole.num_bytes, row))):
            if not part.num_bytes:
                continue
            kept = search.fragments(stripe, [row], block).get(row)
            if kept is not None and kept.shares[0].whole == whole:
                found = kept.payload
            else:
                found = search.rebuilt(stripe, row, block, whole)
                num_rebuilt_bytes += part.num_bytes
            value[part.offset : part.stop] = found
    if whole_of(value) != whole:
        raise Corrupt(f"what was recovered of {host}'s snapshot {snapshot} is not what {host} had offered")
    return Recovered(value, num_rebuilt_bytes, tuple(sorted(search.bad)))


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
        return self.code.rebuild(present, {row: shares[row].num_bytes})[row]

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
