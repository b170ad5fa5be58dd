"""The replica watch: ranks compare fingerprints of their state, and a corrupt one is found and named.

A bit that flips in memory, or an accelerator that computes wrongly, raises no error: without a comparison the
replicas drift apart and every checkpoint after is worthless. Costs 8 bytes a tensor on the wire.
"""

from dataclasses import dataclass
from typing import Any

import torch

from checkpoint import fingerprint_tensor, flatten_state
from elastic.control.majority import Verdict, judge
from elastic.training.ports import World

_SIGN = 1 << 63


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found: the verdict, and the tensors in which a rank differs from rank `source`."""

    verdict: Verdict
    differing: tuple[str, ...] = ()


def compare(world: World, state: Any) -> Comparison:
    """Compare the replicas of a state over all ranks of a world. Raises Broken."""
    tensors = flatten_state(state).tensors
    mine = torch.tensor(
        [fingerprint_tensor(tensor) - _SIGN for tensor in tensors.values()], dtype=torch.int64
    )
    everyones = torch.empty(world.size * len(mine), dtype=torch.int64)
    world.all_gather(everyones, mine)
    fingerprints = everyones.view(world.size, len(mine)).tolist()
    verdict = judge(fingerprints)
    if verdict.source is None:
        return Comparison(verdict)
    right = fingerprints[verdict.source]
    differing = (name for name, a, b in zip(tensors, fingerprints[world.rank], right, strict=True) if a != b)
    return Comparison(verdict, tuple(differing))
