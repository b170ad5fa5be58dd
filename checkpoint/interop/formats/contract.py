"""What a foreign checkpoint is to the rest of the house: tensors read box by box, and plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from checkpoint.errors import Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.moves import Foreign

LEAST_VOCAB = "vocab_at_least"  # a size that files may tell of that do not tell the vocabulary's own

_NO_WEIGHTS = ("optimizer.", "other.")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class About:
    """What a foreign checkpoint says of itself.

    `format` is the name that `--format` takes. `axes` says how many ranks of which axis hold its tensors; it
    is empty where the tensors are global ones. `extra` is what is no tensor (configuration, arguments,
    schedulers, parameter groups), as plain data; `sizes` what of it the rule language needs ("layers",
    "heads", ...), as far as that is known, and `rules` the built-in rule set for such a model. `notes` tell
    what was left out, and why. `ties` say of which weight a name is another name. `doubts` are sets of
    parameters whose optimizer states nothing but their order tells apart; `untold` is why it cannot be told
    at all whose an optimizer's states are, which are other tensors then.
    """

    format: str
    axes: Mapping[str, int] = field(default_factory=dict)
    step: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[tuple[str, ...], ...] = ()
    rules: str | None = None
    untold: str = ""


def is_weight(name: str) -> bool:
    """Whether a tensor of this name is the model's: see `ForeignCheckpoint`."""
    return not name.startswith(_NO_WEIGHTS)


def weight_name(name: str, where: str) -> str:
    """Return the name of a weight or buffer. Raises Unsupported for one that would be taken for no weight."""
    if not is_weight(name):
        raise Unsupported(
            f"{where} has a weight {name!r}: by names that begin with 'optimizer.' and 'other.' conversions "
            "tell what is no weight. Rename that module, and save it again"
        )
    return name


class ForeignCheckpoint(Protocol):
    """An opened foreign checkpoint.

    A tensor of the model has its parameter's (or buffer's) name there; one of the optimizer is called
    "optimizer.STATE.PARAMETER" (exp_avg, exp_avg_sq, step, master, ...); any other one "other.PATH".
    """

    @property
    def about(self) -> About:
        """What it says of itself."""

    @property
    def tensors(self) -> Sequence[Foreign]:
        """Its tensors; `read` takes their places here."""

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of a tensor, row by row, in its dtype's carrier type.

        Thread-safe. Raises Corrupt or Incomplete naming the file that lacks them.
        """

    def settle(self) -> None:
        """See that what was read is what checksums in the files say, if they have any. Raises Corrupt."""


class Contents(Protocol):
    """What a writer writes: foreign tensors, as a plan lays them out, whose bits come from somewhere else.

    A reader is one as well: what was opened can be written in the same or another format.
    """

    @property
    def about(self) -> About:
        """What is no tensor, and over which ranks the tensors are spread."""

    @property
    def tensors(self) -> Sequence[Foreign]:
        """The tensors to write, named as in `ForeignCheckpoint`."""

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of one of them."""
