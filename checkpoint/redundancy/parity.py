"""Protects what hosts hold by parity in their peers' memories: offered by each, then encoded by all.

Block 0 of a row is always put last: where it is, the row is whole.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from checkpoint.errors import Corrupt, PeerLost
from checkpoint.redundancy.codes import code_of
from checkpoint.redundancy.fragment import (
    Fragment,
    decode_fragment,
    encode_fragment,
    share_of,
    whole_of,
)
from checkpoint.redundancy.parts import Parts
from checkpoint.redundancy.peers import Peers, Place
from checkpoint.redundancy.stripes import Stripes, every_name, first_blocks, prefix_of
from checkpoint.store.contract import Buffer


@dataclass(frozen=True, slots=True)
class Protected:
    """What it took to encode a stripe: bytes fetched from peers, and bytes of parity that were put."""

    num_data_bytes: int
    num_parity_bytes: int


def offer(peers: Peers, stripes: Stripes, *, host: str, snapshot: str, value: Buffer | Parts) -> None:
    """Make this host's value of a snapshot known to its peers, from its own memory: nothing travels.

    Once all hosts of the group have offered theirs, `protect` may follow. A snapshot's name is a key; what is
    offered under one name is always the same value.
    """
    parts = value if isinstance(value, Parts) else Parts([value])
    whole = whole_of(parts)
    for row, stripe in stripes.rows_of(host):
        blocks = stripes.blocks(stripes.piece(parts.num_bytes, row))
        for number, part in reversed(list(enumerate(blocks))):
            payload = parts.piece(part.offset, part.stop)
            place = stripes.place(snapshot, stripe, row, number)
            peers.put(place, encode_fragment(place.name, Fragment((share_of(whole, payload),), payload)))


def protect(peers: Peers, stripes: Stripes, *, host: str, snapshot: str) -> Protected:
    """Encode the one stripe that falls to this host, from what the others have offered, and place its parity.

    When every host of the group has done so, any `num_parity` of them may be lost. To do it again, after a
    lost host was replaced and has offered its value, mends what is missing. Raises PeerLost if a host is gone
    or has not offered.
    """
    group = stripes.group
    stripe = group.own_stripe(host)
    rows = range(group.num_data)
    first = _offered(peers, {row: stripes.place(snapshot, stripe, row, 0) for row in rows})
    wholes = [first[row].shares[0].whole for row in rows]
    lengths = [stripes.piece(whole.num_bytes, row).num_bytes for row, whole in enumerate(wholes)]
    code = code_of(group.num_data, group.num_parity)
    num_parity_bytes = 0
    for block in reversed(range(max(1, -(-max(lengths) // stripes.block_bytes)))):
        longer = [row for row in rows if lengths[row] > block * stripes.block_bytes]
        found = _offered(peers, {row: stripes.place(snapshot, stripe, row, block) for row in longer})
        shares = tuple(found[row].shares[0] if row in found else share_of(wholes[row], b"") for row in rows)
        if any(share.whole != whole for share, whole in zip(shares, wholes, strict=True)):
            raise Corrupt(
                f"a host offered two different values as snapshot {snapshot}: give each its own name"
            )
        payloads = [found[row].payload if row in found else b"" for row in rows]
        for row, parity in enumerate(code.encode(payloads), group.num_data):
            place = stripes.place(snapshot, stripe, row, block)
            peers.put(place, encode_fragment(place.name, Fragment(shares, parity)))
            num_parity_bytes += memoryview(parity).nbytes
    return Protected(sum(lengths), num_parity_bytes)


def recoverable(peers: Peers, stripes: Stripes) -> list[str]:
    """List the snapshots of which every host's value can be had from the peers that are left, by name."""
    group = stripes.group
    num_rows: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for peer in group.hosts:
        with suppress(PeerLost):
            for snapshot, stripe, row in first_blocks(peers.keys(peer, every_name())):
                num_rows[snapshot][stripe].add(row)
    return sorted(
        snapshot
        for snapshot, rows in num_rows.items()
        if all(len(rows[stripe]) >= group.num_data for stripe in range(len(group.hosts)))
    )


def forget(peers: Peers, stripes: Stripes, *, snapshot: str) -> None:
    """Drop what every peer that can be reached keeps of a snapshot."""
    for peer in stripes.group.hosts:
        with suppress(PeerLost):
            peers.drop(peer, prefix_of(snapshot))


def _offered(peers: Peers, places: Mapping[int, Place]) -> dict[int, Fragment]:
    """Fetch what must be there, by row. Raises PeerLost, or Corrupt."""
    found = zip(places.items(), peers.fetch(list(places.values())), strict=True)
    fragments: dict[int, Fragment] = {}
    for (row, place), data in found:
        if data is None:
            raise PeerLost(
                f"{place.peer} is gone, or has not offered {place.name}: let it offer its value first"
            )
        fragments[row] = decode_fragment(place.name, data)
    return fragments
