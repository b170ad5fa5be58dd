"""Reading together: what several ranks want is read once among them, and broadcast.

Which ranks want what is arithmetic that every rank does alike; only reading itself speaks to the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from checkpoint.engine.leaves import Holders
from checkpoint.engine.regions import Regions, find_uncovered, padded
from checkpoint.engine.targets import Wanted
from checkpoint.format.manifest import TensorRecord

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A tensor that is wanted, box by box, each by some ranks; `wanted` are the boxes that this one fills."""

    label: str
    holders: Holders
    wanted: tuple[Wanted, ...]


class Replicas:
    """Some ranks of `torch.distributed`, as a restore takes them (`Group`)."""

    def __init__(self, ranks: Ranks, group: Any) -> None:
        self._ranks = ranks
        self._group = group
        self._is_on_device = dist.get_backend(group) == "nccl"

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return self._ranks.index(dist.get_rank())

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._ranks)

    def broadcast(self, memory: memoryview, root: int) -> None:
        """Make the memory of every rank like that of `root`."""
        if not memory.nbytes:
            return
        own = torch.frombuffer(memory, dtype=torch.uint8)
        sent = own.cuda() if self._is_on_device else own
        dist.broadcast(sent, src=self._ranks[root], group=self._group)
        if self._is_on_device:
            own.copy_(sent)


def digest_of(requests: Sequence[Request]) -> str:
    """Digest what all ranks have to agree on before they read together."""
    told = {
        number: xxhash.xxh3_128_hexdigest(
            "\n".join(f"{box.start} {box.size} {ranks}" for box, ranks in holders.items()).encode()
        )
        for number, holders in _distinct(requests).items()
    }
    listed = "\n".join(f"{one.label} {told[id(one.holders)]}" for one in requests)
    return xxhash.xxh3_128_hexdigest(listed.encode())


def by_ranks(requests: Sequence[Request]) -> Mapping[Ranks, list[Wanted]]:
    """Sort what is wanted by who wants it; every rank gets the same keys, in the same order."""
    groups = {
        ranks
        for holders in _distinct(requests).values()
        for box, ranks in holders.items()
        if not box.is_empty
    }
    found: dict[Ranks, list[Wanted]] = {ranks: [] for ranks in sorted(groups)}
    for one in requests:
        for wanted in one.wanted:
            found[one.holders[wanted.box]].append(wanted)
    return found


def are_shared_out(requests: Sequence[Request], records: Mapping[str, TensorRecord]) -> bool:
    """Whether what all ranks want is all of each tensor, once: then each may prove its part."""
    if len({one.label for one in requests}) < len(requests):
        return False
    distinct = {(id(one.holders), records[one.label].shape): one.holders for one in requests}
    shapes = [shape for _, shape in distinct]
    numbers = [number for number, holders in enumerate(distinct.values()) for _ in holders]
    boxes = Regions.of([box for holders in distinct.values() for box in holders], numbers)
    num_dims = max(map(len, shapes), default=0)
    return find_uncovered(boxes, padded(shapes, num_dims, 1), range(len(shapes))) is None


def _distinct(requests: Sequence[Request]) -> Mapping[int, Holders]:
    """Return the holders of all requests, by identity: those of a thousand layers are a few."""
    return {id(one.holders): one.holders for one in requests}


@contextmanager
def replicas(ranks: Ranks, rank: int, size: int) -> Iterator[Replicas | None]:
    """Give the group of some ranks for a while; None to others, or if it is one. All ranks call it."""
    if len(ranks) == 1:
        yield None
    elif len(ranks) == size:
        yield Replicas(ranks, dist.group.WORLD)
    else:
        group = dist.new_group(list(ranks))
        try:
            yield Replicas(ranks, group) if rank in ranks else None
        finally:
            if rank in ranks:
                dist.destroy_process_group(group)
