"""Proof of a conversion: content fingerprints of the global tensors, from the foreign ones alone. Pure.

Every foreign tensor adds its share, rank by rank, so nothing has to be put together first. What was written
is proved by comparing: equal fingerprints, tensor by tensor, mean that no element was lost, doubled, swapped
or misplaced.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Mismatch
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.interop.moves import How, Plan

Array = NDArray[Any]


def changed_tensors(plan: Plan) -> set[str]:
    """Return the global tensors whose values the rules change: averaged or cast, they have no fingerprint."""
    return {
        plan.tensors[move.target].name
        for move in plan.moves
        if move.how is How.MEAN or plan.foreign[move.source].dtype != plan.tensors[move.target].dtype
    }


def fingerprints_of_sources(plan: Plan, read: Callable[[int], Array]) -> dict[str, int]:
    """Return the fingerprint of every global tensor whose values are not changed, from the foreign tensors.

    `read(number)` returns the bits of a foreign tensor as an array of its shape; it is called once for each.

    Raises Mismatch naming a tensor whose copies on several ranks differ.
    """
    changed = changed_tensors(plan)
    sums = {spec.name: 0 for spec in plan.tensors if spec.name not in changed}
    copies: dict[tuple[int, object], tuple[int, int]] = {}
    by_source: dict[int, list[int]] = {}
    for number, move in enumerate(plan.moves):
        by_source.setdefault(move.source, []).append(number)
    for source, numbers in by_source.items():
        bits = read(source)
        for number in numbers:
            move = plan.moves[number]
            spec = plan.tensors[move.target]
            if spec.name in changed:
                continue
            region = bits[
                tuple(slice(a, b) for a, b in zip(move.source_box.start, move.source_box.stop, strict=True))
            ]
            data = np.ascontiguousarray(region.transpose(move.order))
            value = fingerprint(data, spec.dtype, spec.shape, move.target_box)
            known, first = copies.setdefault((move.target, move.target_box), (value, source))
            if known != value:
                raise Mismatch(
                    f"{spec.name!r}: the copies in {plan.foreign[first]} and {plan.foreign[source]} differ"
                )
            if move.how is How.FILL:
                sums[spec.name] = (sums[spec.name] + value) % MODULUS
    return sums


def check_equal(sources: Mapping[str, int], targets: Mapping[str, int]) -> None:
    """See that the same tensors have the same fingerprints. Raises Mismatch naming those that do not."""
    missing, extra = sorted(sources.keys() - targets.keys()), sorted(targets.keys() - sources.keys())
    if missing or extra:
        raise Mismatch(f"tensors are missing in the target: {missing[:5]}, or new in it: {extra[:5]}")
    changed = [name for name, value in sources.items() if targets[name] != value]
    if changed:
        raise Mismatch(f"the content of {len(changed)} of {len(sources)} tensors differs: {changed[:5]}")
