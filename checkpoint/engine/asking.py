"""Which checkpoints there are: all sources are asked at once, and a far one out of reach delays nobody."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from checkpoint.engine.pipeline import apart
from checkpoint.engine.source import Source
from checkpoint.errors import StoreUnavailable


@dataclass(frozen=True, slots=True)
class Answers:
    """The steps that any source has, newest first, and by its place each source that could not tell."""

    steps: list[int]
    outages: dict[int, StoreUnavailable]


def ask_for_steps(sources: Sequence[Source], patience_s: float) -> Answers:
    """Ask every source, the nearest first in the list, for its steps.

    What a far source has, the nearer ones had before it: once a nearer one has told of steps, the others are
    waited for `patience_s` at most. Raises StoreUnavailable if no source can tell.
    """
    told: SimpleQueue[tuple[int, list[int] | BaseException]] = SimpleQueue()
    for number, source in enumerate(sources):
        apart(partial(_ask, number, source, told))
    pending, steps = set(range(len(sources))), set[int]()
    nearest, deadline = len(sources), float("inf")  # of those that told of steps
    outages: dict[int, StoreUnavailable] = {}
    while pending:
        try:
            number, answer = told.get(timeout=_remaining(deadline))
        except Empty:
            break
        pending.remove(number)
        match answer:
            case StoreUnavailable():
                outages[number] = answer
            case BaseException():
                raise answer
            case _:
                steps.update(answer)
                nearest = min(nearest, number) if answer else nearest
        if nearest < min(pending, default=0):
            deadline = min(deadline, time.monotonic() + patience_s)
    for number in pending:
        outages[number] = StoreUnavailable(f"{sources[number].name} did not answer for {patience_s:g} s")
    if sources and len(outages) == len(sources):
        raise outages[min(outages)]
    return Answers(sorted(steps, reverse=True), outages)


def _remaining(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0)


def _ask(number: int, source: Source, told: "SimpleQueue[tuple[int, list[int] | BaseException]]") -> None:
    try:
        told.put((number, source.steps()))
    except Exception as error:  # noqa: BLE001 -- raised by who asked
        told.put((number, error))
