"""Replicas restore together: each chunk is read by one of them, and broadcast to the others.

Whatever one rank meets, all of them learn of: they fail, fall back and succeed together.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np

from checkpoint import errors
from checkpoint.engine.reading import Group, Holes
from checkpoint.engine.regions import Column, Regions
from checkpoint.engine.targets import Target, Wanted
from checkpoint.errors import CheckpointError, Corrupt, Mismatch
from checkpoint.format.codec import checksum

_BUNDLE_BYTES = 4 << 20  # small regions are sent together up to here

Result = TypeVar("Result")


class Circle:
    """What the ranks of a group tell each other."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def together(self, work: Callable[[], Result]) -> Result:
        """Do work on every rank; raise on all of them what went wrong on the first on which something did."""
        result: list[Result] = []
        problem = ["", ""]
        try:
            result.append(work())
        except CheckpointError as error:
            problem = [type(error).__name__, str(error)]
        told = [self._say(root, json.dumps(problem).encode()) for root in range(self._group.size)]
        for rank, (kind, why) in enumerate(map(json.loads, told)):
            if kind:
                raise _kind_of(kind)(f"on rank {rank} of the replicas: {why}")
        return result[0]

    def alike(self, what: str, value: bytes) -> None:
        """Raise Mismatch on every rank if not all have the same value."""
        told = [self._say(root, value) for root in range(self._group.size)]
        different = [rank for rank, other in enumerate(told) if other != told[0]]
        if different:
            raise Mismatch(f"the replicas of ranks 0 and {different[0]} have {what} that are not the same")

    def steps(self, steps: Callable[[], list[int]]) -> list[int]:
        """Return the steps that rank 0 knows of."""
        own = self.together(lambda: steps() if self._group.rank == 0 else [])
        found: list[int] = json.loads(self._say(0, json.dumps(own).encode()))
        return found

    def dealt(self, deal: Callable[[int], tuple[Holes, Column]]) -> tuple[Holes, Column]:
        """Return the regions that rank 0 dealt, and which rank reads which."""
        own = self.together(lambda: deal(self._group.size) if self._group.rank == 0 else None)
        data = b""
        if own is not None:
            holes, owners = own
            columns = [
                holes.wanted,
                holes.regions.tensors,
                owners,
                *holes.regions.starts.T,
                *holes.regions.sizes.T,
            ]
            data = np.stack(columns).astype("<i8").tobytes()
        num_dims = int(self._say(0, str(own[0].regions.starts.shape[1]).encode() if own else b""))
        table = np.frombuffer(self._say(0, data), "<i8").reshape(3 + 2 * num_dims, -1).astype(np.int64)
        starts, sizes = table[3 : 3 + num_dims].T, table[3 + num_dims :].T
        return Holes(table[0], Regions(table[1], starts, sizes)), table[2]

    def own(self, holes: Holes, owners: Column) -> Holes:
        """Return what this rank is to read."""
        mine = owners == self._group.rank
        return Holes(holes.wanted[mine], holes.regions.take(mine))

    def exchange(self, holes: Holes, owners: Column, targets: Sequence[Target]) -> None:
        """Send what this rank has read to the others, and take what they send.

        Raises Corrupt on every rank if something did not arrive as it was sent.
        """
        sent: list[list[bytes]] = [[] for _ in range(self._group.size)]
        for root, bundle in _bundles(holes, owners, targets):
            sent[root].append(self._send(root, holes, bundle, targets))
        for root, digests in enumerate(sent):
            arrived = b"".join(digests)
            self.together(partial(_check_arrived, arrived, self._say(root, arrived), root))

    def _send(self, root: int, holes: Holes, rows: Sequence[int], targets: Sequence[Target]) -> bytes:
        """Send some regions from root to all; return the checksum of their bytes."""
        places = []
        for row in rows:
            target = targets[int(holes.wanted[row])]
            places.append((target, holes.regions.box(row, len(target.box.size))))
        memory = places[0][0].memory(places[0][1]) if len(places) == 1 else None
        if memory is not None:
            self._group.broadcast(memory, root)
            return checksum(memory)
        parts = [target.get(box) for target, box in places]
        memory = memoryview(bytearray().join(part.tobytes() for part in parts))
        self._group.broadcast(memory, root)
        first = 0
        for (target, box), part in zip(places, parts, strict=True):
            if root != self._group.rank:
                values = np.frombuffer(memory, part.dtype, part.size, first).reshape(part.shape)
                target.put(box.start, values)
            first += part.nbytes
        return checksum(memory)

    def _say(self, root: int, data: bytes) -> bytes:
        """Return root's data on every rank."""
        length = bytearray(len(data).to_bytes(8, "little"))
        self._group.broadcast(memoryview(length), root)
        memory = bytearray(int.from_bytes(length, "little"))
        if root == self._group.rank:
            memory[:] = data
        if memory:
            self._group.broadcast(memoryview(memory), root)
        return bytes(memory)


def digest_of(wanted: Sequence[Wanted]) -> bytes:
    """Return the same bytes for the same boxes of the same tensors, wherever they go."""
    what = [(one.name, one.dtype, one.shape, one.box.start, one.box.size) for one in wanted]
    return checksum(json.dumps(what).encode())


def _bundles(holes: Holes, owners: Column, targets: Sequence[Target]) -> Iterator[tuple[int, list[int]]]:
    """Yield what is sent at a time: neighbours of one owner, until they are worth it."""
    for root, rows in groupby(range(len(owners)), key=lambda row: int(owners[row])):
        bundle: list[int] = []
        num_bytes = 0
        for row in rows:
            more = int(holes.regions.numels[row]) * targets[int(holes.wanted[row])].itemsize
            if bundle and num_bytes + more > _BUNDLE_BYTES:
                yield root, bundle
                bundle, num_bytes = [], 0
            bundle.append(row)
            num_bytes += more
        yield root, bundle


def _check_arrived(arrived: bytes, right: bytes, root: int) -> None:
    if arrived != right:
        raise Corrupt(f"what rank {root} of the replicas sent did not arrive as it was: restore again")


def _kind_of(name: str) -> type[CheckpointError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, CheckpointError) else CheckpointError
