"""Which replicas hold corrupt state: those whose fingerprints are not the majority's. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranks that differ from the majority, and the lowest rank of it; `source` is None without one."""

    corrupt: frozenset[int]
    source: int | None


def judge(fingerprints: Sequence[Sequence[int]]) -> Verdict:
    """Compare what replicas hold: `fingerprints[rank]`, tensor by tensor.

    More than half of the ranks have to agree on everything; two that differ tell only that one is wrong.
    """
    votes = Counter(tuple(each) for each in fingerprints)
    winner, count = votes.most_common(1)[0]
    corrupt = frozenset(rank for rank, each in enumerate(fingerprints) if tuple(each) != winner)
    if 2 * count <= len(fingerprints):
        return Verdict(frozenset(range(len(fingerprints))), None)
    return Verdict(corrupt, min(set(range(len(fingerprints))) - corrupt))
