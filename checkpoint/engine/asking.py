"""Which checkpoints there are: all sources are asked at once, and a far one out of reach delays nobody."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event

from checkpoint.engine.pipeline import apart
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.source import Source, StoreSource
from checkpoint.errors import StoreUnavailable
from checkpoint.store.wrappers import tried_while

_Told = SimpleQueue[tuple[int, list[int] | BaseException]]


@dataclass(frozen=True, slots=True)
class Answers:
    """The steps that any source has, newest first, and by its place each source that could not tell."""

    steps: list[int]
    outages: dict[int, StoreUnavailable]


def ask_for_steps(sources: Sequence[Source], policy: ReadPolicy) -> Answers:
    """Ask every source, the nearest first in the list, for its steps.

    What a far source has, the nearer ones had before it: once a nearer one has told of steps, the others are
    waited for `patience_s` at most; once a nearer store has told that it has none, for `empty_patience_s`.
    Raises StoreUnavailable if no source can tell, or if those that can have nothing: what another one has
    would be trained anew.
    """
    told, is_over = _Told(), Event()
    asks = [partial(_ask, number, source, told, is_over) for number, source in enumerate(sources)]
    for ask in asks if len(asks) > 1 else ():
        apart(ask)
    try:
        if len(asks) == 1:
            asks[0]()  # nobody else is waited for meanwhile
        return _heard(sources, policy, told)
    finally:
        is_over.set()


def _heard(sources: Sequence[Source], policy: ReadPolicy, told: _Told) -> Answers:
    """Collect what the sources tell."""
    pending, steps = set(range(len(sources))), set[int]()
    nearest, deadline = len(sources), float("inf")  # of those that told of steps
    began_s, nearest_store = time.monotonic(), len(sources)  # of those that told
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
                is_store = isinstance(sources[number], StoreSource)
                nearest_store = min(nearest_store, number) if is_store else nearest_store
        if nearest < min(pending, default=0):
            deadline = min(deadline, time.monotonic() + policy.patience_s)
        elif nearest_store < min(pending, default=0):
            deadline = min(deadline, time.monotonic() + policy.empty_patience_s)
    for number in pending:
        waited_s = time.monotonic() - began_s
        outages[number] = StoreUnavailable(f"{sources[number].name} did not answer for {waited_s:.1f} s")
    _check_some(sources, steps, outages)
    return Answers(sorted(steps, reverse=True), outages)


def _check_some(sources: Sequence[Source], steps: set[int], outages: dict[int, StoreUnavailable]) -> None:
    """Raise StoreUnavailable if nothing was found, and may be where nobody could look."""
    if not outages or steps:
        return
    first = outages[min(outages)]
    if len(outages) == len(sources):
        raise first
    names = ", ".join(sources[number].name for number in sorted(outages))
    raise StoreUnavailable(
        f"there is no checkpoint where it could be asked, and {names} may have some: {first}. Try again "
        "later (`ReadPolicy(empty_patience_s=)` waits longer), or, to start from nothing, without that tier"
    ) from first


def _remaining(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0)


def _ask(number: int, source: Source, told: _Told, is_over: Event) -> None:
    try:
        with tried_while(lambda: not is_over.is_set()):
            told.put((number, source.steps()))
    except Exception as error:  # noqa: BLE001 -- raised by who asked
        told.put((number, error))
