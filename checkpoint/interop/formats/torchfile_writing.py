"""Writes files of torch.save: a state as a training program would have saved it."""

from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.containers import Containers, containers_of
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.nesting import nest
from checkpoint.interop.formats.optimizer_dicts import Keys
from checkpoint.interop.formats.saving import Saving
from checkpoint.interop.formats.streams import blocks_of, check_global

FILE = "checkpoint.pt"


def write_torch(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write one file of torch.save: the model, the optimizer by numbers and names, and what else there is.

    `torch.load(..., weights_only=True)` reads it. Raises Unsupported for what it cannot say.
    """
    check_global(contents.tensors, "torch")
    told = containers_of(contents.about.extra) or Containers()
    saving = Saving(nest(contents, told.torch_keys or Keys.NUMBERS))
    if FILE not in draft.kept:
        with draft.writing(FILE) as file:
            saving.write(file, lambda number: blocks_of(contents, number, budget_bytes))
