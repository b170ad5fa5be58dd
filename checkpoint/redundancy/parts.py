"""One value that lies in several buffers: read as if they were one, copied only at the joints."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from checkpoint.store.contract import Buffer


class Parts:
    """The bytes of some buffers, in order."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [view for view in (memoryview(one).cast("B") for one in buffers) if view.nbytes]
        self._starts = [0, *accumulate(view.nbytes for view in self._views)]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._views)

    @property
    def num_bytes(self) -> int:
        """How long the value is."""
        return self._starts[-1]

    def piece(self, start: int, stop: int) -> Buffer:
        """Return some of the bytes: a view if they lie in one buffer, else a copy."""
        found = self.pieces(start, stop)
        return found[0] if len(found) == 1 else b"".join(found)

    def pieces(self, start: int, stop: int) -> list[memoryview]:
        """Return some of the bytes as views, one for each buffer that holds any."""
        found = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            view, first = self._views[number], self._starts[number]
            found.append(view[start - first : stop - first])
            start = first + view.nbytes
            number += 1
        return found
