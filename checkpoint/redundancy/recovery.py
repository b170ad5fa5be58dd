"""Recovers one host's value: block by block from where it is, or rebuilt from any k rows of its stripe."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from checkpoint.errors import Corrupt, PeerLost, Unrecoverable
from checkpoint.redundancy.codes import Code, code_of, xor_into
from checkpoint.redundancy.fragment import (
    Fragment,
    Share,
    Whole,
    decode_fragment,
    decode_unproved,
    is_of,
    payload_offset,
    whole_of,
)
from checkpoint.redundancy.peers import Peers, Piece, PiecePeers, Place
from checkpoint.redundancy.scratch import scratch
from checkpoint.redundancy.stripes import Stripes
from checkpoint.store.contract import Buffer, ByteRange

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
    recovery = Recovery(peers, stripes, host=host, snapshot=snapshot)
    value = memoryview(allocate(recovery.whole.num_bytes)).cast("B")
    recovery.read_into(value, 0)
    if whole_of(value) != recovery.whole:
        raise Corrupt(f"what was recovered of {host}'s snapshot {snapshot} is not what {host} had offered")
    return Recovered(value, recovery.num_rebuilt_bytes, recovery.bad)


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a host's value: where it lies in its group, and which bytes of the value it is."""

    stripe: int
    row: int
    number: int
    part: ByteRange


class Recovery:
    """One host's value of a snapshot, read piece by piece from what is left of its group. Thread-safe.

    Every block is proved by the checksum that its host, or a parity over it, tells. Raises Unrecoverable if
    more is lost than the parity makes up for.
    """

    def __init__(
        self, peers: Peers, stripes: Stripes, *, host: str, snapshot: str, num_together: int = 1
    ) -> None:
        """Ask peers for what so many blocks take at once: that takes `working_bytes` for each, about."""
        self._num_together = num_together
        code = code_of(stripes.group.num_data, stripes.group.num_parity)
        self._search = _Search(peers, stripes, snapshot, code)
        self._stripes = stripes
        self._host = host
        self._pieces = peers if stripes.group.num_parity == 1 and isinstance(peers, PiecePeers) else None
        self.whole = self._search.whole_of(host)
        self.num_rebuilt_bytes = 0
        self._lock = threading.Lock()
        self._kept: dict[int, Future[Buffer]] = {}  # by where they begin; those under way, and the last ones

    @property
    def bad(self) -> tuple[str, ...]:
        """The names of the fragments that were found damaged."""
        return tuple(sorted(self._search.bad))

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill memory with the value's bytes from an offset on."""
        stop = offset + memory.nbytes
        blocks = self._blocks(offset, stop)
        for first in range(0, len(blocks), self._num_together):
            for part, found in self._together(blocks[first : first + self._num_together]):
                start, upto = max(offset, part.offset), min(stop, part.stop)
                wanted = memoryview(found)[start - part.offset : upto - part.offset]
                memory[start - offset : upto - offset] = wanted
            self._forget_all_but_the_last()

    @property
    def can_read_quickly(self) -> bool:
        """Whether bytes can be rebuilt from the same bytes of other rows: they can with one parity."""
        return self._pieces is not None

    def read_quickly(self, memory: memoryview, offset: int) -> None:
        """Rebuild the value's bytes from an offset on, for who proves them: nothing here looks at them.

        Raises PeerLost if any of the same bytes of the other rows is not there; `read_into` may do without.
        """
        if self._pieces is None:
            raise PeerLost(f"nothing of {self._host}'s can be read quickly")
        num_data, stop = self._stripes.group.num_data, offset + memory.nbytes
        pieces, sums = [], []
        for block in self._blocks(offset, stop):
            start, upto = max(offset, block.part.offset), min(stop, block.part.stop)
            total = memory[start - offset : upto - offset]
            rows = self._search.rows_for(block)
            if len(rows) < num_data:
                raise PeerLost(f"too few of the hosts that have rows beside {self._host}'s are left")
            for row, place in rows.items():
                is_parity = row == num_data
                begin = payload_offset(num_data if is_parity else 1) + start - block.part.offset
                room = total if is_parity else scratch(total.nbytes).data
                pieces.append(Piece(place, begin, room))
                sums += [] if is_parity else [(total, room)]
        self._pieces.read_into(pieces)
        for total, room in sums:
            xor_into(total, room)
        with self._lock:
            self.num_rebuilt_bytes += memory.nbytes

    def _together(self, blocks: Sequence[_Block]) -> Iterator[tuple[ByteRange, Buffer]]:
        """Yield blocks; each is got by whoever wants it first, and the others wait for that."""
        with self._lock:
            mine = [block for block in blocks if block.part.offset not in self._kept]
            for block in mine:
                self._kept[block.part.offset] = Future()
            waited = [self._kept[block.part.offset] for block in blocks]
        self._fill(mine)
        for block, future in zip(blocks, waited, strict=True):
            yield block.part, future.result()

    def _blocks(self, offset: int, stop: int) -> list[_Block]:
        """List the blocks that hold some bytes of the value."""
        stripes, found = self._stripes, []
        while offset < stop:
            row = offset // stripes.piece(self.whole.num_bytes, 0).num_bytes
            piece = stripes.piece(self.whole.num_bytes, row)
            number = (offset - piece.offset) // stripes.block_bytes
            start = piece.offset + number * stripes.block_bytes
            part = ByteRange(start, min(stripes.block_bytes, piece.stop - start))
            found.append(_Block(stripes.group.stripe_of(self._host, row), row, number, part))
            offset = part.stop
        return found

    def _fill(self, blocks: Sequence[_Block]) -> None:
        """Get blocks that nobody else is getting; who waits for one learns what went wrong with it."""
        search, whole = self._search, self.whole
        quick = search.rebuilt_together(blocks, whole) if search.is_gone(self._host) else {}
        for block in blocks:
            future = self._kept[block.part.offset]
            try:
                found = quick.get(block) or search.kept(block, whole)
                is_rebuilt = found is None or block in quick
                found = found or search.rebuilt(block.stripe, block.row, block.number, whole)
            except Exception as error:  # noqa: BLE001 -- raised by all who wait for it
                with self._lock:
                    self._kept.pop(block.part.offset)
                future.set_exception(error)
                continue
            with self._lock:
                self.num_rebuilt_bytes += block.part.num_bytes if is_rebuilt else 0
            future.set_result(found)

    def _forget_all_but_the_last(self) -> None:
        with self._lock:
            done = [place for place, future in self._kept.items() if future.done()]
            for place in done[: -self._num_together]:
                del self._kept[place]


@dataclass(slots=True)
class _Search:
    """One recovery on its way: where it looks, and what it found damaged."""

    peers: Peers
    stripes: Stripes
    snapshot: str
    code: Code
    bad: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)

    def is_gone(self, host: str) -> bool:
        """Whether a host had nothing when it was asked."""
        return host in self.gone

    def kept(self, block: _Block, whole: Whole) -> Buffer | None:
        """Return a block from where it is, if it is there."""
        found = self.fragments(block.stripe, [block.row], block.number).get(block.row)
        return found.payload if found is not None and found.shares[0].whole == whole else None

    def rebuilt_together(self, blocks: Sequence[_Block], whole: Whole) -> dict[_Block, Buffer]:
        """Rebuild blocks, asking for all that takes at once, and proving only what comes out.

        Those of which a row is missing, or that do not come out right, are left out.
        """
        wanted = {block: self.rows_for(block) for block in blocks}
        places = [place for rows in wanted.values() for place in rows.values()]
        found = dict(zip(places, self.peers.fetch(places), strict=True))
        rebuilt: dict[_Block, Buffer] = {}
        for block, rows in wanted.items():
            present = {row: found.pop(place) for row, place in rows.items()}
            with suppress(Corrupt):
                out = self._unproved(block, rows, present, whole)
                if out is not None:
                    rebuilt[block] = out
        return rebuilt

    def rows_for(self, block: _Block) -> dict[int, Place]:
        """Choose k rows other than a block's own, the first parity among them, on hosts that answered."""
        stripes, group = self.stripes, self.stripes.group
        others = [group.num_data, *(row for row in range(len(group.hosts)) if row != group.num_data)]
        places = {row: stripes.place(self.snapshot, block.stripe, row, block.number) for row in others}
        there = [row for row in others if row != block.row and places[row].peer not in self.gone]
        return {row: places[row] for row in there[: group.num_data]}

    def _unproved(
        self, block: _Block, places: Mapping[int, Place], data: Mapping[int, Buffer | None], whole: Whole
    ) -> Buffer | None:
        """Rebuild a block from rows whose bytes nobody has looked at; None if it does not come out right."""
        num_data = self.stripes.group.num_data
        good = {
            row: decode_unproved(places[row].name, found) for row, found in data.items() if found is not None
        }
        shares, present = self._agreeing(good)
        if not shares or len(present) < num_data or shares[block.row].whole != whole:
            return None
        share = shares[block.row]
        out = self.code.rebuild(present, {block.row: share.num_bytes})[block.row]
        return out if is_of(share, out) else None

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
        found = list(zip(rows, places, self.peers.fetch(places), strict=True))
        self.gone.update(place.peer for _, place, data in found if data is None)
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
