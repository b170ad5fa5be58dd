"""Writes Megatron-LM's legacy checkpoints: a file for each rank, with its part of the model."""

from argparse import Namespace
from collections.abc import Mapping
from itertools import product
from typing import Any

from checkpoint.errors import Unsupported
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import About, Contents, is_weight
from checkpoint.interop.formats.megatron_arguments import arguments_for
from checkpoint.interop.formats.megatron_files import AXES, FILE, TRACKER, folder_of
from checkpoint.interop.formats.saving import Later, Saving
from checkpoint.interop.formats.streams import blocks_of
from checkpoint.interop.formats.told import HYPER

_VERSION = 3.0
# Weights and options of an optimizer that is not written; what no rank needs a copy of.
_NOT_BESIDE = {HYPER, "optimizer", "model", "files", "containers", "rng_state", "rerun_state_machine"}


def write_megatron(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write the model of every rank; the tracker, which names the iteration, comes last.

    Raises Unsupported for optimizer states: Megatron numbers them in the order in which the model makes its
    parameters, which tensors by name do not tell. Leave them out; Megatron then begins with fresh ones.
    """
    axes = {"tensor": 1, "pipeline": 1, **contents.about.axes}
    strange = sorted(axes.keys() - AXES.keys())
    if strange:
        raise Unsupported(f"Megatron's folders have no number for the axes {strange}; they count {[*AXES]}")
    models: dict[tuple[int, ...], dict[str, Later]] = {}
    for number, tensor in enumerate(contents.tensors):
        if not is_weight(tensor.name):
            raise Unsupported(
                f"Megatron numbers its optimizer's states by an order that {tensor.name!r} does not tell: "
                "write the weights only"
            )
        place = tuple(tensor.at.get(axis, 0) for axis in axes)
        models.setdefault(place, {})[tensor.name] = Later(number, tensor.dtype, tensor.shape)
    step = contents.about.step or 0
    arguments = _arguments(contents.about, axes)
    beside = {key: value for key, value in contents.about.extra.items() if key not in _NOT_BESIDE}
    for ranks in product(*(range(size) for size in axes.values())):
        at = dict(zip(axes, ranks, strict=True))
        path = f"iter_{step:07}/{folder_of(axes, at)}/{FILE}"
        tree = {
            **beside,
            "args": Namespace(**arguments),
            "checkpoint_version": _VERSION,
            "iteration": step,
            "model": models.get(ranks, {}),
        }
        if path not in draft.kept:
            with draft.writing(path) as file:
                Saving(tree).write(file, lambda number: blocks_of(contents, number, budget_bytes))
    with draft.writing(TRACKER) as file:
        file.write(str(step).encode())


def _arguments(about: About, axes: Mapping[str, int]) -> dict[str, Any]:
    ranks = {name: axes.get(axis, 1) for axis, name in AXES.items()}  # not the source's, nor its padding
    return {**arguments_for(about), **ranks}
