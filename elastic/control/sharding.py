"""Which ranks hold the optimizer's state of which parameters, some more than once. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

Holders = tuple[tuple[int, ...], ...]
"""`holders[p]` are the ranks that hold the state of parameter p; the first gives its values to the others."""


def deal_states(
    num_bytes: Sequence[int],
    held: Sequence[Collection[int]],
    hosts: Sequence[str],
    copies: int,
    *,
    leaving: Collection[int] = (),
) -> Holders:
    """Give each parameter's state to `copies` ranks (or to all), on different hosts if possible; none to
    those that are leaving.

    `held[rank]` are the parameters whose state a rank has already: it keeps them, as far as no rank gets more
    than its share. The largest are dealt first, each to the least loaded (Graham's LPT rule).
    """
    staying = [rank for rank in range(len(hosts)) if rank not in leaving]
    copies = min(copies, len(staying))
    dealer = _Dealer(held, hosts, staying, sum(num_bytes) * copies / len(staying), [0] * len(hosts))
    giving = [0] * len(hosts)
    holders: list[tuple[int, ...]] = [()] * len(num_bytes)
    for number in sorted(range(len(num_bytes)), key=lambda each: (-num_bytes[each], each)):
        chosen: list[int] = []
        for _ in range(copies):
            chosen.append(dealer.give(number, num_bytes[number], chosen))
        chosen.sort(key=lambda rank: (giving[rank], rank))
        giving[chosen[0]] += num_bytes[number]
        holders[number] = tuple(chosen)
    return tuple(holders)


def lost_states(held: Sequence[Collection[int]], num_states: int) -> list[int]:
    """List the parameters whose state no rank holds any more."""
    there = set().union(*held)
    return [number for number in range(num_states) if number not in there]


def moves(held: Sequence[Collection[int]], holders: Holders) -> dict[tuple[int, int], list[int]]:
    """List what each (sender, receiver) moves so that everybody holds what `holders` says.

    Senders take turns, so that none of several holders sends everything.
    """
    sent = [0] * len(held)
    found: dict[tuple[int, int], list[int]] = {}
    for number, ranks in enumerate(holders):
        having = [rank for rank, each in enumerate(held) if number in each]
        for receiver in ranks:
            if receiver in having:
                continue
            sender = min(having, key=lambda rank: (sent[rank], rank))
            sent[sender] += 1
            found.setdefault((sender, receiver), []).append(number)
    return found


@dataclass(frozen=True, slots=True)
class _Dealer:
    """Gives states to the `staying` ranks; `fair` is how many bytes each should come to hold, `load` how many
    it holds.
    """

    held: Sequence[Collection[int]]
    hosts: Sequence[str]
    staying: Sequence[int]
    fair: float
    load: list[int]

    def give(self, number: int, num_bytes: int, chosen: Sequence[int]) -> int:
        """Give a state to the best of the ranks that were not chosen for it yet."""
        taken = {self.hosts[rank] for rank in chosen}

        def badness(rank: int) -> tuple[bool, bool, int, int]:
            keeps = number in self.held[rank] and self.load[rank] + num_bytes <= self.fair
            return self.hosts[rank] in taken, not keeps, self.load[rank], rank

        best = min((rank for rank in self.staying if rank not in chosen), key=badness)
        self.load[best] += num_bytes
        return best
