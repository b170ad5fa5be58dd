"""Where each member of a new world stands, and how they come to stand at the same step. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

BLANK = -1


@dataclass(frozen=True, slots=True)
class Standing:
    """What one member holds when a world forms.

    `committed` counts the optimizer steps it has applied (0 is the initial state, `BLANK` no state at all).
    `reduced` is the step whose globally reduced gradients it still holds, `BLANK` when it holds none;
    it can only be the step that would be applied next, so it equals `committed` or `BLANK`.
    """

    committed: int
    reduced: int = BLANK


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a world comes to one step: some apply the gradients they hold, some receive state from `source`.

    `step` is the step everybody has committed afterwards; `BLANK` means that nobody holds state, and that
    `source` has to restore or initialise it first.
    """

    step: int
    source: int
    appliers: frozenset[int]
    receivers: frozenset[int]


def settle(standings: Sequence[Standing]) -> Settlement:
    """Bring ranks that stand at different points of a step to one committed step, losing none.

    A rank commits a step only after all ranks of its world held the reduced gradients. So if one survivor has
    committed step n, every other one can apply its own (equal) gradients of step n; if none has, they apply
    them only when all of them hold them, and else redo the step.
    """
    everyone = range(len(standings))
    living = [rank for rank in everyone if standings[rank].committed != BLANK]
    if not living:
        return Settlement(BLANK, 0, frozenset(), frozenset(everyone[1:]))
    top = max(standings[rank].committed for rank in living)
    if all(standings[rank].reduced == standings[rank].committed == top for rank in living):
        return _settlement(top + 1, living, frozenset(living), everyone)
    appliers = frozenset(
        rank for rank in living if standings[rank].reduced == standings[rank].committed == top - 1
    )
    holders = [rank for rank in living if standings[rank].committed == top or rank in appliers]
    return _settlement(top, holders, appliers, everyone)


def _settlement(step: int, holders: list[int], appliers: frozenset[int], everyone: range) -> Settlement:
    return Settlement(step, holders[0], appliers, frozenset(everyone) - frozenset(holders))
