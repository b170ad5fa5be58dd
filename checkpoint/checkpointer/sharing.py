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

from checkpoint.engine.regions import Regions, find_uncovered, padded
from checkpoint.engine.targets import Wanted
from checkpoint.format.layout import Box
from checkpoint.format.manifest import TensorRecord

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A box that some ranks want; `wanted` is None on a rank that is none of them."""

    label: str
    box: Box
    ranks: Ranks
    wanted: Wanted | None


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
    listed = "\n".join(f"{one.label} {one.box.start} {one.box.size} {one.ranks}" for one in requests)
    return xxhash.xxh3_128_hexdigest(listed.encode())


def by_ranks(requests: Sequence[Request]) -> Mapping[Ranks, list[Wanted]]:
    """Sort requests by who wants them; every rank gets the same keys, in the same order."""
    found: dict[Ranks, list[Wanted]] = {ranks: [] for ranks in sorted({one.ranks for one in requests})}
    for one in requests:
        if one.wanted is not None:
            found[one.ranks].append(one.wanted)
    return found


def are_shared_out(requests: Sequence[Request], records: Mapping[str, TensorRecord]) -> bool:
    """Whether what all ranks want is all of each tensor, once: then each may prove its part."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(one.label for one in requests))}
    shapes = [records[name].shape for name in numbers]
    num_dims = max(map(len, shapes), default=0)
    boxes = Regions.of([one.box for one in requests], [numbers[one.label] for one in requests])
    return find_uncovered(boxes, padded(shapes, num_dims, 1), range(len(shapes))) is None


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
