"""Writes Megatron-Core's distributed checkpoints: model and optimizer, for any layout of ranks."""

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from checkpoint.errors import Unsupported
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import About, Array, Contents
from checkpoint.interop.formats.dcp_writing import Flat, write_flat
from checkpoint.interop.formats.megatron_arguments import arguments_for
from checkpoint.interop.formats.megatron_dist import BACKEND, COMMON, CONFIG
from checkpoint.interop.formats.megatron_dist_names import Layers, put_together
from checkpoint.interop.formats.megatron_files import AXES, TRACKER
from checkpoint.interop.formats.megatron_groups import one_for_all
from checkpoint.interop.formats.saving import Later, Saving
from checkpoint.interop.formats.streams import check_global
from checkpoint.interop.formats.told import HYPER, STEP, step_of_groups, told_numbers
from checkpoint.interop.moves import Foreign

_VERSION = 3.0
_FORM = "fully_reshardable"
_MOMENT = "optimizer.exp_avg."
_NOT_COMMON = {HYPER, "optimizer", "model"}  # the latter two have places of their own, which Megatron checks
# The modules that keep FP8 scales: Megatron asks for their states, and takes none for none.
_SCALED = (".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")
_IDENTITY: Mapping[str, Any] = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


def write_megatron_dist(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a checkpoint that Megatron-Core loads into any layout; the tracker, which names it, comes last.

    Tensors have the names and shapes of a world of one rank. Raises Unsupported for what Megatron has no
    place for: tensors of several ranks, steps that differ, an optimizer whose options are not known.
    """
    check_global(contents.tensors, "megatron-dist")
    stacked = _Stacked(contents)
    step, folder = contents.about.step or 0, f"iter_{contents.about.step or 0:07}"
    values: dict[str, Any] = {
        tensor.name: Later(number, tensor.dtype, tensor.shape)
        for number, tensor in enumerate(stacked.tensors)
    }
    common = {
        **{key: value for key, value in contents.about.extra.items() if key not in _NOT_COMMON},
        "args": Namespace(**_arguments(contents.about)),
        "checkpoint_version": _VERSION,
        "iteration": step,
        "content_metadata": _metadata(stacked.layers),
        **_optimizer(contents),
    }
    path = f"{folder}/{COMMON}"
    if path not in draft.kept:
        with draft.writing(path) as file:
            Saving(common).write(file, lambda _: [])
    flat = Flat({**values, **dict(_objects(stacked.tensors))}, folder=f"{folder}/")
    write_flat(draft, stacked, flat, budget_bytes)
    config = {"sharded_backend": BACKEND, "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    for name, text in ((f"{folder}/{CONFIG}", json.dumps(config)), (TRACKER, str(step))):
        with draft.writing(name) as file:
            file.write(text.encode())


@dataclass(slots=True)
class _Stack:
    """The tensors that go into one key, by their place in its leading dims."""

    dtype: str
    shape: tuple[int, ...]
    members: dict[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many layers, and experts, the leading dims count."""
        return tuple(1 + max(column) for column in zip(*self.members, strict=True))

    @property
    def is_full(self) -> bool:
        """Whether there is a tensor at every place."""
        return len(self.members) == math.prod(self.counts)


class _Stacked:
    """Contents by Megatron's keys: what it keeps of layers and experts in one tensor is one here."""

    def __init__(self, contents: Contents) -> None:
        self.about, self._inner = contents.about, contents
        stacks = _stacks(contents.tensors, Layers.STACKED)
        self.layers = Layers.STACKED if stacks is not None else Layers.NUMBERED
        stacks = stacks or _stacks(contents.tensors, Layers.NUMBERED)
        if stacks is None:
            raise Unsupported("the experts of a layer have different shapes, which Megatron's cannot have")
        self._stacks = list(stacks.values())
        self.tensors: Sequence[Foreign] = [
            Foreign(key, stack.dtype, (*stack.counts, *stack.shape)) for key, stack in stacks.items()
        ]

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of one of them."""
        stack = self._stacks[number]
        depth = len(stack.counts)
        if not depth:
            return self._inner.read(stack.members[()], box)
        inner = Box(box.start[depth:], box.size[depth:])
        out: Array = np.empty(box.size, dtype_of(stack.dtype).carrier)
        for steps in product(*(range(count) for count in box.size[:depth])):
            place = tuple(first + step for first, step in zip(box.start, steps, strict=False))
            out[steps] = self._inner.read(stack.members[place], inner)
        return out


def _stacks(tensors: Sequence[Foreign], layers: Layers) -> dict[str, _Stack] | None:
    """Return what goes into each key; None if layers (or experts) are not all alike."""
    found: dict[str, _Stack] = {}
    for number, tensor in enumerate(tensors):
        if tensor.name.startswith(STEP):
            continue
        if tensor.name.startswith("other."):
            raise Unsupported(f"Megatron's checkpoints have no place for {tensor.name!r}: leave it out")
        slot = put_together(tensor.name, layers)
        stack = found.setdefault(slot.key, _Stack(tensor.dtype, tensor.shape))
        if (stack.dtype, stack.shape) != (tensor.dtype, tensor.shape):
            return None
        stack.members[slot.numbers] = number
    return found if all(stack.is_full for stack in found.values()) else None


def _objects(tensors: Sequence[Foreign]) -> Iterator[tuple[str, Any]]:
    """Yield the states of modules, which are nothing: one for each layer, and expert, of a module."""
    for tensor in tensors:
        if tensor.name.endswith(_SCALED) and not tensor.name.startswith("optimizer."):
            counts = tensor.shape[:-2] or (1,)
            for place in product(*(range(count) for count in counts)):
                at, of = (".".join(map(str, numbers)) for numbers in (place, counts))
                yield f"{tensor.name.removesuffix('weight')}_extra_state/shard_{at}_{of}", [None]


# ---------------------------------------------------------------------------------------- what lies around


def _metadata(layers: Layers) -> dict[str, Any]:
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": layers is Layers.NUMBERED,
        "distrib_optim_sharding_type": _FORM,
    }


def _arguments(about: About) -> dict[str, Any]:
    return {**arguments_for(about), **dict.fromkeys(AXES.values(), 1)}


def _optimizer(contents: Contents) -> dict[str, Any]:
    """Return what of an optimizer is no tensor; the experts of several ranks have one of their own."""
    step = _step_of(contents)
    if step is None:
        return {}
    groups = [{**group, "step": step} for group in _groups(contents)]
    form = {"param_state_sharding_type": _FORM}
    chained = [[one for one in groups if one["is_expert_parallel"] is kind] for kind in (False, True)]
    if not chained[1]:
        return {"optimizer": {"optimizer": {"param_groups": groups}, **form}}
    return {
        "optimizer": {
            number: {"optimizer": {"param_groups": each}, **form} for number, each in enumerate(chained)
        }
    }


def _step_of(contents: Contents) -> int | None:
    """Return the step that the optimizer has done; None if there is no optimizer. Raises Unsupported."""
    told, found = told_numbers(contents.about.extra), dict[int, str]()
    for number, tensor in enumerate(contents.tensors):
        if tensor.name.startswith(STEP):
            bits = contents.read(number, Box((), ())).view(tensor.dtype)
            found.setdefault(int(bits), tensor.name)
        name = tensor.name.replace(_MOMENT, STEP, 1)
        if tensor.name.startswith(_MOMENT) and name in told:
            found.setdefault(int(told[name]), name)
    if len(found) > 1:
        raise Unsupported(f"Megatron keeps one step for all parameters, and there are {sorted(found)[:5]}")
    if not found and any(tensor.name.startswith(_MOMENT) for tensor in contents.tensors):
        return int(step_of_groups(contents.about))
    return next(iter(found), None)


def _groups(contents: Contents) -> list[dict[str, Any]]:
    """Return the options of the optimizer's groups: Megatron's own, or others' with and without decay."""
    said = contents.about.extra.get(HYPER)
    if isinstance(said, list) and said:
        return [{**_IDENTITY, "wd_mult": 1.0, **group} for group in said if isinstance(group, dict)]
    options, decay = one_for_all(contents)
    made = [{**options, **_IDENTITY, "wd_mult": mult, "weight_decay": decay * mult} for mult in (1.0, 0.0)]
    has_experts = any(".experts." in tensor.name for tensor in contents.tensors)
    return [*made, {**made[0], "is_expert_parallel": True}] if has_experts else made
