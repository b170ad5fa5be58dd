"""Buckets: ranges of a gradient row, each of which can be reduced as soon as backward has completed it.

All ranks cut alike and start in one order, from the row's end (the layers that backward comes to first) to
its start, so that their collectives meet. Where to cut changes no bit of a sum over ranks' rows, element by
element.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

from elastic.errors import JobRejected
from elastic.training.gradients import GradientRows
from elastic.training.tree import ALIGNMENT, slice_length

Start = Callable[[slice], None]
"""Starts the reduction of one bucket."""

BUCKET_MIB = 4.0
_BYTES = 4  # of an element


class Buckets:
    """Watches the model's gradients come, micro-batch by micro-batch.

    Backward tells when a parameter's gradient was added to, not that it was for the last time (a layer may
    be used in several backward passes of one micro-batch, as checkpointed ones are). So the micro-batches
    before tell how often it is; a bucket with a parameter that gets no gradient, or less often than usual,
    is started after backward.
    """

    def __init__(self, rows: GradientRows, bucket_mib: float) -> None:
        self._rows = rows
        self._bucket_bytes = bucket_mib * 2**20
        self._usual = [0] * len(rows.parameters)
        self._seen = [0] * len(rows.parameters)
        self._starting: _Starting | None = None
        for index, parameter in enumerate(rows.parameters):
            hook = partial(self._add, index)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's

    def cut(self, world_size: int) -> list[slice]:
        """Cut a row into buckets of about the wanted size, each of equal aligned slices for every rank.

        In the order in which they are to be started. No size means one bucket.
        """
        unit = world_size * ALIGNMENT
        units = world_size * slice_length(self._rows.num_elements, world_size) // unit
        wanted = units * unit * _BYTES / self._bucket_bytes if self._bucket_bytes else 1
        count = max(1, round(min(units, wanted)))
        cuts = [units * index // count * unit for index in range(count + 1)]
        return [slice(cuts[index], cuts[index + 1]) for index in reversed(range(count))]

    @contextmanager
    def watch(self, buckets: Sequence[slice], start: Start) -> Iterator[None]:
        """Watch one micro-batch; start buckets as they are completed, and after it those that are left."""
        self._seen = [0] * len(self._seen)
        self._starting = starting = _Starting(self._rows, buckets, start)
        try:
            yield
        finally:
            self._starting = None
        self._usual = list(map(max, self._usual, self._seen))
        for bucket in buckets[starting.num_started :]:
            start(bucket)

    def _add(self, index: int, _: object) -> None:
        """Backward has added to a parameter's gradient."""
        self._seen[index] += 1
        if self._starting is None:
            return
        if self._starting.is_started(index):
            raise JobRejected(
                f"parameter {self._rows.names[index]} got its gradient in {self._seen[index]} pieces, more "
                "than in the micro-batches before: set training.bucket_mib = 0, which reduces after backward"
            )
        if self._seen[index] == self._usual[index]:
            self._starting.complete(index)


class _Starting:
    """Which buckets still wait for which gradients, during one backward."""

    def __init__(self, rows: GradientRows, buckets: Sequence[slice], start: Start) -> None:
        self._buckets, self._start = buckets, start
        self._of = [_meeting(buckets, place) for place in rows.places]
        self._missing = [0] * len(buckets)
        # The losses are complete after backward only.
        for number in [*chain.from_iterable(self._of), *_meeting(buckets, slice(0, rows.places[0].start))]:
            self._missing[number] += 1
        self.num_started = 0

    def is_started(self, index: int) -> bool:
        """Return whether some of a parameter's gradient is on its way already."""
        return any(number < self.num_started for number in self._of[index])

    def complete(self, index: int) -> None:
        """Take note that a parameter's gradient is complete; start what is next while it is whole."""
        for number in self._of[index]:
            self._missing[number] -= 1
        while not self._missing[self.num_started]:
            bucket = self._buckets[self.num_started]
            self.num_started += 1
            self._start(bucket)


def _meeting(buckets: Sequence[slice], place: slice) -> list[int]:
    """List the buckets that have something in common with a place."""
    return [
        number
        for number, bucket in enumerate(buckets)
        if bucket.start < place.stop and place.start < bucket.stop
    ]
