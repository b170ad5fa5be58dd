"""How far the hosts of a world are with protecting a snapshot: marks that they leave in each other's memory.

A snapshot's name carries generation and step, and the marks carry the host that left them: what belongs to
another step or generation is never taken for this one's.
"""

from collections.abc import Collection, Iterable
from enum import StrEnum

from checkpoint.engine.ledger import SnapshotId
from checkpoint.redundancy.peers import Peers, Place

_ROOT = "marks/"


class Mark(StrEnum):
    """What a host says of a snapshot."""

    ORDERED = "ordered"  # the first host: protect this one now
    OFFERED = "offered"  # its rows can be fetched
    DONE = "done"  # its stripe is encoded, the parity lies where it belongs
    VOID = "void"  # it cannot go on


def name_of(id_: SnapshotId) -> str:
    """Return a snapshot's name among peers; newer ones sort after older ones."""
    return f"{id_[0]:012d}.{id_[1]:012d}"


def parse_name(name: str) -> SnapshotId | None:
    """Return the generation and step of a snapshot's name; None if it is none."""
    generation, _, step = name.partition(".")
    return (int(generation), int(step)) if generation.isdecimal() and step.isdecimal() else None


def marks_of(id_: SnapshotId) -> str:
    """Return what the names of all marks on a snapshot begin with."""
    return f"{_ROOT}{name_of(id_)}:"


def mark_name(id_: SnapshotId, mark: Mark, host: str) -> str:
    """Return the name of one host's mark."""
    return f"{marks_of(id_)}{mark}.{host}"


def put_mark(peers: Peers, hosts: Iterable[str], name: str, said: str = "") -> None:
    """Leave a mark with some hosts, and what is said besides. Raises PeerLost."""
    for host in hosts:
        peers.put(Place(host, name), [said.encode()])


def missing(names: Collection[str], id_: SnapshotId, mark: Mark, hosts: Iterable[str]) -> list[str]:
    """List the hosts that have not left a mark yet."""
    return [host for host in hosts if mark_name(id_, mark, host) not in names]


def voided_by(names: Collection[str], id_: SnapshotId) -> str | None:
    """Return a host that cannot go on with a snapshot, if there is one."""
    start = f"{marks_of(id_)}{Mark.VOID}."
    return next((name.removeprefix(start) for name in names if name.startswith(start)), None)


def newest_order(names: Collection[str], leader: str) -> SnapshotId | None:
    """Return the newest snapshot that the first host ordered to protect."""
    end = f":{Mark.ORDERED}.{leader}"
    found = [name.removeprefix(_ROOT).removesuffix(end) for name in names if name.endswith(end)]
    ids = [id_ for id_ in map(parse_name, found) if id_ is not None]
    return max(ids, default=None)


def older_than(names: Collection[str], id_: SnapshotId) -> list[str]:
    """List what is kept of snapshots before this one: fragments and marks."""
    found = []
    for name in names:
        of = parse_name(name.partition("/")[2].partition(":")[0])
        if of is not None and of < id_:
            found.append(name)
    return found
