"""Who computes which virtual ranks. Pure."""

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise

WORTH = 0.9
"""A dealing has to shorten a step to this share of its time, or the present one stays: noise moves none."""

Dealing = tuple[tuple[int, ...], ...]
"""`dealing[rank]` are the virtual ranks of each rank, in order."""


def deal(num_virtual: int, seconds: Sequence[float], present: Dealing | None = None) -> Dealing:
    """Deal `num_virtual` virtual ranks in contiguous ranges over ranks that need `seconds` for one each.

    As at `present` (None: evenly), unless dealing by speed is clearly faster: a step lasts as long as its
    slowest rank. A rank whose speed is not known yet (0 seconds) makes it even. Raises ValueError if a rank
    would get none.
    """
    size = len(seconds)
    if not 1 <= size <= num_virtual:
        raise ValueError(
            f"cannot deal {num_virtual} virtual ranks over {size} workers: "
            "raise training.virtual_ranks or lower world.workers"
        )
    cuts = [num_virtual * rank // size for rank in range(size + 1)]
    counts = [stop - start for start, stop in pairwise(cuts)]
    if min(seconds) > 0:
        counts = counts if present is None else list(map(len, present))
        by_speed = _shares(num_virtual, seconds)
        if _makespan(by_speed, seconds) <= WORTH * _makespan(counts, seconds):
            counts = by_speed
    return _cut(range(num_virtual), counts)


def deal_rest(num_virtual: int, held: Sequence[Collection[int]]) -> Dealing:
    """Deal a step anew that a lost rank interrupted: `held[rank]` are those whose gradients a rank holds.

    It keeps them; the rest is dealt evenly, so that nothing is computed twice. Two holders of one virtual
    rank: the lower rank keeps it.
    """
    owners: dict[int, int] = {}
    for rank, virtual_ranks in enumerate(held):
        for virtual_rank in virtual_ranks:
            owners.setdefault(virtual_rank, rank)
    rest = [virtual_rank for virtual_rank in range(num_virtual) if virtual_rank not in owners]
    cuts = [len(rest) * rank // len(held) for rank in range(len(held) + 1)]
    fresh = _cut(rest, [stop - start for start, stop in pairwise(cuts)])
    return tuple(
        tuple(sorted({*new, *(v for v in held[rank] if owners[v] == rank)})) for rank, new in enumerate(fresh)
    )


def _cut(virtual_ranks: Sequence[int], counts: Sequence[int]) -> Dealing:
    return tuple(tuple(virtual_ranks[start:stop]) for start, stop in pairwise(accumulate(counts, initial=0)))


def _shares(num_virtual: int, seconds: Sequence[float]) -> list[int]:
    """Give one to each, then each to the rank that would be done with it first: no dealing is faster."""
    counts = [1] * len(seconds)
    for _ in range(num_virtual - len(seconds)):
        counts[min(range(len(counts)), key=lambda rank: ((counts[rank] + 1) * seconds[rank], rank))] += 1
    return counts


def _makespan(counts: Sequence[int], seconds: Sequence[float]) -> float:
    return max(count * each for count, each in zip(counts, seconds, strict=True))
