"""The weights in DeepSpeed's files of model states: 16-bit parameters, frozen ones, tied ones, buffers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Mismatch
from checkpoint.format.box import Box, boxes_of_run
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.contract import weight_name
from checkpoint.interop.formats.deepspeed_files import RankFile
from checkpoint.interop.formats.deepspeed_parts import Shape
from checkpoint.interop.formats.deepspeed_state import Collected, run_of
from checkpoint.interop.formats.rounding import ROUNDED
from checkpoint.interop.formats.tiles import Tile
from checkpoint.interop.formats.twins import Samples, check_distinct
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

_MODULE = "module"


@dataclass(frozen=True, slots=True)
class ModelStates:
    """One model-parallel rank's files of model states: one, or with ZeRO-3 one of each data-parallel rank."""

    files: Sequence[RankFile]
    shapes: Sequence[Mapping[str, Shape]]  # of the parameters of each group
    stage: int
    at: Mapping[str, int]
    place: Place


def collect_weights(states: ModelStates, collected: Collected) -> dict[str, dict[str, str]]:
    """Add what the model states hold; return the weights that only a master tells, with their dtypes."""
    tree, archive = states.files[0].archive.tree, states.files[0].archive
    module = tree.get(_MODULE)
    if not isinstance(module, dict):
        raise Corrupt(f"{states.files[0].path} holds no model: is it of a pipeline?")
    shapes = {name: shape for members in states.shapes for name, shape in members.items()}
    frozen = tree.get("frozen_param_shapes") or {}
    shared = tree.get("shared_params") or {}
    told: dict[str, dict[str, str]] = {}
    for name, tensor in module.items():
        if not isinstance(tensor, Stored):
            continue
        is_divided = states.stage == 3 and name not in (tree.get("buffer_names") or ())
        if not is_divided or (tensor.shape and tensor.shape == shapes.get(name)):
            _check_shape(states, name, tensor, shapes)
            collected.add(
                Foreign(weight_name(name, states.files[0].path), tensor.dtype, tensor.shape, states.at),
                [Tile(Box.whole(tensor.shape), partial(archive.locate, tensor))],
            )
        elif str(shared.get(name, name)) in shapes:
            dtype = tensor.dtype if tensor.dtype in ROUNDED else "float32"
            told.setdefault(str(shared.get(name, name)), {})[name] = dtype
        elif name not in frozen:
            collected.notes.append(
                f"the model has {name!r}, of which ZeRO-3 says neither shape nor content: a tied weight?"
            )
    if states.stage == 3:
        check_distinct(states.place, [_parts_of_frozen(file) for file in states.files])
    _frozen(states, collected, module)
    return told


def _parts_of_frozen(file: RankFile) -> Samples:
    """Return what each rank's file of model states has a part of its own of."""
    parts = (file.archive.tree.get("frozen_param_fragments") or {}).values()
    return Samples(file.path, file.archive, [part for part in parts if isinstance(part, Stored)])


def _check_shape(states: ModelStates, name: str, tensor: Stored, shapes: Mapping[str, Shape]) -> None:
    if name in shapes and tensor.shape != shapes[name]:
        raise Mismatch(
            f"{states.files[0].path}: {name!r} has the shape {tensor.shape}, and should have {shapes[name]}"
        )


def _frozen(states: ModelStates, collected: Collected, module: Mapping[str, Any]) -> None:
    """Add the frozen parameters: with ZeRO-3, each rank's file holds its part."""
    shapes = states.files[0].archive.tree.get("frozen_param_shapes") or {}
    for name, said in shapes.items():
        shape = tuple(said)
        if states.stage != 3 and name in module:
            continue
        parts = [(file.archive.tree.get("frozen_param_fragments") or {}).get(name) for file in states.files]
        length = -(-math.prod(shape) // len(parts)) if states.stage == 3 else math.prod(shape)
        tiles, dtype = [], "float32"
        for number, part in enumerate(parts):
            if not isinstance(part, Stored) or math.prod(part.shape) != length:
                raise Incomplete(f"{states.files[number].path} lacks its part of the frozen {name!r}")
            dtype, first = part.dtype, number * length
            find, start = cache(partial(states.files[number].archive.locate, part)), 0
            for box in boxes_of_run(
                shape, min(first, math.prod(shape)), min(first + length, math.prod(shape))
            ):
                tiles.append(Tile(box, partial(run_of, find, start, box.size)))
                start += box.numel
        collected.add(Foreign(weight_name(name, states.files[0].path), dtype, shape, states.at), tiles)
