"""Buckets: ranges of a gradient row, each of which can be reduced as soon as backward has completed it.

All ranks cut alike and start in one order, from the row's end (the layers that backward comes to first) to
its start, so that their collectives meet. Where to cut changes no bit of a sum over ranks' rows, element by
element.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

from elastic.errors import JobRejected
from elastic.training.gradients import GradientRows
from elastic.training.tree import ALIGNMENT, slice_length

Start = Callable[[slice], None]
"""Starts the reduction of one bucket."""

BUCKET_MIB = 4.0
_BYTES = 4  # of an element


@dataclass(frozen=True, slots=True)
class Cut:
    """A row's buckets in the order of their starts; `of[i]` are those that have some of gradient `i`, and
    `awaited[bucket]` is how much has to be complete before it starts.
    """

    buckets: tuple[slice, ...]
    of: tuple[tuple[int, ...], ...]
    awaited: tuple[int, ...]


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
        self._cuts: dict[int, Cut] = {}
        self.whole = _cut(rows, 1, 1)
        self._usual = [0] * len(rows.parameters)
        self._seen = [0] * len(rows.parameters)
        self._starting: _Starting | None = None
        self._num_writes: int | None = None  # to the bound row before a micro-batch, until its backward comes
        for index, parameter in enumerate(rows.parameters):
            hook = partial(self._add, index)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's

    def cut(self, world_size: int) -> Cut:
        """Cut a row into buckets of about the wanted size, each of equal aligned slices for every rank.

        No size means one bucket.
        """
        if world_size not in self._cuts:
            num_bytes = self._rows.num_elements * _BYTES
            wanted = num_bytes / self._bucket_bytes if self._bucket_bytes else 1
            self._cuts[world_size] = _cut(self._rows, world_size, wanted)
        return self._cuts[world_size]

    @contextmanager
    def watch(self, cut: Cut, start: Start) -> Iterator[None]:
        """Watch one micro-batch; start buckets as they are completed, and after it those that are left."""
        self._seen = [0] * len(self._seen)
        self._starting = starting = _Starting(cut, start)
        self._num_writes = self._rows.num_writes
        try:
            yield
        finally:
            self._starting = None
        self._usual = list(map(max, self._usual, self._seen))
        for bucket in cut.buckets[starting.num_started :]:
            start(bucket)

    def _add(self, index: int, _: object) -> None:
        """Backward has added to a parameter's gradient."""
        self._seen[index] += 1
        if self._starting is None:
            return
        if self._num_writes is not None:
            self._check_untouched(self._num_writes)
            self._num_writes = None
        if self._starting.is_started(index):
            raise JobRejected(
                f"parameter {self._rows.names[index]} got its gradient in {self._seen[index]} pieces, more "
                "than in the micro-batches before: set training.bucket_mib = 0, which reduces after backward"
            )
        if self._seen[index] == self._usual[index]:
            self._starting.complete(index)

    def _check_untouched(self, num_writes: int) -> None:
        """Raise JobRejected if more than backward's first addition was written since."""
        if self._rows.num_writes > num_writes + 1:
            raise JobRejected(
                "the job's loss changed gradients (as zero_grad does), which may be of other micro-batches: "
                "they are the trainer's, which zeroes them itself; leave zero_grad out of the job's loss"
            )


class _Starting:
    """Which buckets still wait for which gradients, during one backward."""

    def __init__(self, cut: Cut, start: Start) -> None:
        self._cut, self._start = cut, start
        self._awaited = list(cut.awaited)
        self.num_started = 0

    def is_started(self, index: int) -> bool:
        """Return whether some of a parameter's gradient is on its way already."""
        return any(number < self.num_started for number in self._cut.of[index])

    def complete(self, index: int) -> None:
        """Take note that a parameter's gradient is complete; start what is next while it is whole."""
        for number in self._cut.of[index]:
            self._awaited[number] -= 1
        while not self._awaited[self.num_started]:
            bucket = self._cut.buckets[self.num_started]
            self.num_started += 1
            self._start(bucket)


def _cut(rows: GradientRows, world_size: int, wanted: float) -> Cut:
    unit = world_size * ALIGNMENT
    units = slice_length(rows.num_elements, world_size) // ALIGNMENT
    count = max(1, round(min(units, wanted)))
    ends = [units * index // count * unit for index in range(count + 1)]
    buckets = tuple(slice(ends[index], ends[index + 1]) for index in reversed(range(count)))

    def meeting(place: slice) -> tuple[int, ...]:
        return tuple(
            n for n, each in enumerate(buckets) if each.start < place.stop and place.start < each.stop
        )

    of = tuple(map(meeting, rows.places))
    awaited = [0] * count
    # The losses, before the gradients, are complete after backward only.
    for number in chain(meeting(slice(0, rows.places[0].start)), *of):
        awaited[number] += 1
    return Cut(buckets, of, tuple(awaited))
