"""One member's part in the replica watch: what was found is healed, and a dispute without a majority ends.

Of two copies that differ nobody knows which is right. All go back to the newest checkpoint, whose state was
compared, and compute the step again: who then comes to what it held before was right, who does not was
corrupt. Where that settles nothing either, the dispute ends the run after a few rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from elastic.errors import ReplicasDiffer
from elastic.training.exchange import gather_words
from elastic.training.ports import World
from elastic.training.replicas import (
    Group,
    Healing,
    Prints,
    Replicated,
    differing,
    everyones,
    fingerprints,
    heal,
    healing_of,
)

MAX_DISPUTES = 3


class Disputed(Exception):
    """Copies of state differ, and none has a majority: the newest checkpoint has to be restored."""


class Memory(IntEnum):
    """What a rank that computes a disputed step again says of what it held before."""

    NONE = 0
    SAME = 1
    OTHER = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """What a comparison found: the ranks that were healed, and what was corrupt on this one, now or when it
    fell out with others.
    """

    healed: frozenset[int]
    corrupt: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Dispute:
    """The newest dispute: its step, what this member held, the farthest step in dispute, and how many there
    were since a comparison got as far.
    """

    step: int = -1
    held: Mapping[int, int] | None = None
    farthest: int = -1
    count: int = 0


class ReplicaWatch:
    """Compares what this member holds with the others of its world, and remembers disputes."""

    def __init__(self, member: str, device: torch.device) -> None:
        self._member, self._device = member, device
        self._dispute = _Dispute()

    def look(
        self, world: World, step: int, replicas: Sequence[Replicated], before_healing: Callable[[], object]
    ) -> Finding:
        """Compare, and heal who is corrupt. All ranks of a world do; one without state lists nothing.

        Raises Disputed, and ReplicasDiffer where a dispute does not end; and Broken.
        """
        if world.size == 1:  # there is nobody to compare with
            return Finding(frozenset(), ())
        held = {each.key: each for each in replicas}
        mine = fingerprints(held)
        prints, memories = everyones(world, mine, self._memory(step, mine))
        groups = differing(prints)
        healings = [healing_of(group, prints) or _by_memory(group, prints, memories) for group in groups]
        if undecided := [group for group, each in zip(groups, healings, strict=True) if each is None]:
            self._fall_out(world, step, undecided, held, mine)
        found = [each for each in healings if each is not None]
        wrong = self._wrong(world.rank, found, prints, memories)
        if found:
            before_healing()
            heal(world, held, found, self._device)
        if step >= self._dispute.farthest:
            self._dispute = _Dispute()
        healed = frozenset(rank for each in found for rank in each.corrupt)
        return Finding(healed, tuple(held[key].name for key in wrong))

    def _memory(self, step: int, mine: Prints) -> Memory:
        before = self._dispute.held
        if before is None or self._dispute.step != step or not before.keys() <= mine.keys():
            return Memory.NONE
        return Memory.SAME if all(mine[key] == each for key, each in before.items()) else Memory.OTHER

    def _wrong(
        self, rank: int, healings: Sequence[Healing], prints: Sequence[Prints], memories: Sequence[int]
    ) -> list[int]:
        """List what is corrupt on this rank, or was when it fell out with others."""
        wrong = [
            key
            for each in healings
            if rank in each.corrupt
            for key in each.keys
            if prints[rank][key] != prints[each.source][key]
        ]
        if memories[rank] == Memory.OTHER and Memory.SAME in memories:
            before = self._dispute.held or {}
            wrong += [key for key, each in before.items() if prints[rank][key] != each and key not in wrong]
        return wrong

    def _fall_out(
        self,
        world: World,
        step: int,
        groups: Sequence[Group],
        held: Mapping[int, Replicated],
        mine: Prints,
    ) -> None:
        """Remember a dispute, and raise it by the names of its members and tensors."""
        keys = [key for group in groups for key in group.keys]
        ours = [key for key in keys if key in mine]
        told = gather_words(world, [self._member, min((held[key].name for key in ours), default="")])
        members = " and ".join(told[rank][0] for rank in groups[0].ranks)
        name = next(name for _, name in (told[rank] for rank in groups[0].ranks) if name)
        of = f"{name} and {len(keys) - 1} more tensors" if len(keys) > 1 else name
        what = f"the replicas differ at step {step} in {of}, of {members}, and none has a majority"
        self._dispute = replace(
            self._dispute,
            step=step,
            held={key: mine[key] for key in ours} or None,
            farthest=max(step, self._dispute.farthest),
            count=self._dispute.count + 1,
        )
        if self._dispute.count >= MAX_DISPUTES:
            raise ReplicasDiffer(
                f"{what}, {self._dispute.count} times in a row, though they began alike: one of these "
                "machines computes wrongly; take it out of the cluster, or keep three copies, of which two "
                "agree, and resume the run"
            )
        raise Disputed(what)


def _by_memory(group: Group, prints: Sequence[Prints], memories: Sequence[int]) -> Healing | None:
    """Believe those who came to the same bits twice, if they agree and the others did not."""
    same = [rank for rank in group.ranks if memories[rank] == Memory.SAME]
    held = {tuple(prints[rank][key] for key in group.keys) for rank in same}
    if len(held) != 1 or any(memories[rank] == Memory.NONE for rank in group.ranks):
        return None
    return Healing(same[0], frozenset(group.ranks) - frozenset(same), group.keys)
