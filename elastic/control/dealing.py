"""Who computes which virtual ranks. Pure."""

from itertools import pairwise


def deal(num_virtual: int, world_size: int) -> tuple[range, ...]:
    """Deal `num_virtual` virtual ranks over `world_size` ranks in contiguous ranges that differ by at most
    one.

    Raises ValueError if a rank would get none.
    """
    if not 1 <= world_size <= num_virtual:
        raise ValueError(
            f"cannot deal {num_virtual} virtual ranks over {world_size} workers: "
            "raise training.virtual_ranks or lower world.workers"
        )
    cuts = [num_virtual * rank // world_size for rank in range(world_size + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(cuts))
