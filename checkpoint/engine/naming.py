"""Names of what a host writes: with a life in them that is drawn, so that nobody ever takes one again."""

from collections import defaultdict
from collections.abc import Callable
from uuid import uuid4

from checkpoint.format.keys import MAX_PACK_SEQ, PackKey


def draw_life() -> str:
    """Return a name for a life of a host, which tells what it writes from what others did, or will."""
    return uuid4().hex[:16]


class PackNames:
    """Names the packs of one life of a host, numbered within each generation; of more, if numbers run out."""

    def __init__(self, host: str, life: str, draw: Callable[[], str] = draw_life) -> None:
        self._host = host
        self._life = life
        self._draw = draw
        self._next: defaultdict[int, int] = defaultdict(int)

    def take(self, generation: int) -> PackKey:
        """Return the next name, which nobody else ever takes."""
        if self._next[generation] > MAX_PACK_SEQ:
            self._life = self._draw()
            self._next.clear()
        seq = self._next[generation]
        self._next[generation] = seq + 1
        return PackKey(generation, self._host, seq, self._life)
