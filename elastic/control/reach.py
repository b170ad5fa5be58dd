"""Who is cut off from its peers: the fewest without whom all others reach each other. Pure.

Where a world could not connect each member says whom it cannot reach. Of a pair nobody knows which of the two
it is; so who is in most pairs is named first (a greedy vertex cover), and the one that stays is remembered
until it has reached somebody.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from elastic.control.events import WorldBroken

TIMES = 2  # in a row: a hiccup is over by then

Pair = tuple[str, str]


@dataclass(slots=True)
class Reach:
    """What members said, since a world settled, of whom they cannot reach, and how often in a row."""

    _settled: int = 0
    _spoke_of: dict[str, int] = field(default_factory=dict)
    _said: dict[str, dict[str, int]] = field(default_factory=dict)
    _doubtful: set[str] = field(default_factory=set)

    def take(self, broken: WorldBroken) -> None:
        """Take what a member says of a world that did not connect."""
        known = max(self._settled, self._spoke_of.get(broken.member, 0))
        if broken.unreachable is None or broken.generation <= known:
            return
        before = self._said.get(broken.member, {})
        self._spoke_of[broken.member] = broken.generation
        self._said[broken.member] = {one: before.get(one, 0) + 1 for one in broken.unreachable}

    def settle(self, generation: int) -> None:
        """All of this generation's world have reached each other: what was said before is over."""
        if generation > self._settled:
            self._settled = generation
            self._spoke_of.clear()
            self._said.clear()

    def acquit(self, ranks: Sequence[str]) -> None:
        """These have reached each other."""
        if self._doubtful and len(ranks) > 1:
            self._doubtful.difference_update(ranks)

    def name(self, ranks: Sequence[str], holding: frozenset[str]) -> dict[str, str]:
        """Name the fewest of a world's members without whom all others reach each other, with the evidence.

        What was said counts if it was said twice in a row, or at once by all others. Among equals goes who
        said nothing, then who was apart before from somebody that was named, then who does not hold the
        state, then the highest rank.
        """
        said = dict(self._pairs(ranks))
        rank_of = {one: rank for rank, one in enumerate(ranks)}
        blamed_by = Counter(other for _, other in said)
        agreed = {one for one, num in blamed_by.items() if num == len(ranks) - 1 > 1}
        certain = {pair for pair, times in said.items() if times >= TIMES or pair[1] in agreed}
        named: dict[str, str] = {}
        while certain:
            num_pairs = Counter(one for pair in certain for one in pair)
            worst = max(
                num_pairs,
                key=lambda one: (
                    num_pairs[one],
                    one not in self._spoke_of,
                    one in self._doubtful,
                    one not in holding,
                    rank_of[one],
                ),
            )
            named[worst] = _evidence(worst, said, len(ranks) - 1)
            certain = {pair for pair in certain if worst not in pair}
        self._doubtful |= {one for pair in said if not named.keys().isdisjoint(pair) for one in pair}
        return named

    def _pairs(self, ranks: Sequence[str]) -> Iterator[tuple[Pair, int]]:
        """Yield who of a world cannot reach whom of it, and how often in a row that was said."""
        among = frozenset(ranks)
        for one in ranks:
            for other, times in self._said.get(one, {}).items():
                if other in among:
                    yield (one, other), times


def _evidence(one: str, said: dict[Pair, int], num_others: int) -> str:
    num_blaming = sum(blamed == one for _, blamed in said)
    num_blamed = sum(blaming == one for blaming, _ in said)
    if num_blaming >= num_blamed:
        return f"{num_blaming} of {num_others} workers cannot reach {one}, though it answers"
    return f"{one} cannot reach {num_blamed} of {num_others} workers, though it answers"
