"""A part of a foreign checkpoint: what of its tensors people asked for."""

from collections.abc import Sequence
from dataclasses import replace

from checkpoint.errors import Misuse
from checkpoint.format.box import Box
from checkpoint.interop.conversion.contract import Array
from checkpoint.interop.conversion.names import from_foreign
from checkpoint.interop.conversion.roles import owner_of
from checkpoint.interop.conversion.skeletons import matches
from checkpoint.interop.formats.containers import CONTAINERS, containers_of
from checkpoint.interop.formats.contract import About, ForeignCheckpoint
from checkpoint.interop.formats.told import HYPER
from checkpoint.interop.moves import Foreign


def narrowed(foreign: ForeignCheckpoint, only: str | None, origin: str) -> ForeignCheckpoint:
    """Return what of a foreign checkpoint fits a glob of universal names. Raises Misuse if nothing does."""
    if only is None:
        return foreign
    keeps = matches(only)
    numbers = [number for number, one in enumerate(foreign.tensors) if keeps(from_foreign(one.name))]
    if not numbers:
        raise Misuse(
            f"{only!r} fits nothing of {origin}: its weights are called model/NAME here, states of its "
            "optimizer optimizer/state/NAME/STATE; `holdfast inspect` lists its names"
        )
    return _Narrowed(foreign, numbers)


class _Narrowed:
    def __init__(self, inner: ForeignCheckpoint, numbers: Sequence[int]) -> None:
        self.tensors: Sequence[Foreign] = [inner.tensors[number] for number in numbers]
        self.about = _about(inner.about, self.tensors)
        self._inner, self._numbers = inner, numbers

    def read(self, number: int, box: Box) -> Array:
        return self._inner.read(self._numbers[number], box)

    def settle(self) -> None:
        self._inner.settle()


def _about(about: About, tensors: Sequence[Foreign]) -> About:
    """Return what is said of the part: nothing of an optimizer of which it has no states."""
    if any(owner_of(from_foreign(one.name)) for one in tensors):
        return about
    extra = {key: item for key, item in about.extra.items() if key not in ("optimizer", HYPER)}
    if places := containers_of(extra):
        extra[CONTAINERS] = replace(places, kept={}).told()
    notes = tuple(note for note in about.notes if note != about.untold)
    return replace(about, extra=extra, notes=notes, doubts=())
