"""Writes DeepSpeed's ZeRO checkpoints of stages 1, 2 and 3, for engines of a chosen number of ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import Incomplete, Unsupported
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.deepspeed_objects import NAMES, LossScaler
from checkpoint.interop.formats.deepspeed_partitions import (
    Partition,
    Partitions,
    divided_partition,
    flat_partition,
    frozen_partition,
)
from checkpoint.interop.formats.deepspeed_parts import FLAT, FLAT_3, Shape
from checkpoint.interop.formats.deepspeed_said import merged
from checkpoint.interop.formats.deepspeed_writing import (
    Parts,
    engine_of,
    hyper_of,
    later_of,
    parts_of,
)
from checkpoint.interop.formats.extents import check_shape
from checkpoint.interop.formats.rounding import ROUNDED
from checkpoint.interop.formats.saving import Later, Saving
from checkpoint.interop.formats.streams import check_global
from checkpoint.interop.formats.told import step_of_groups

STAGE, WORLD = "zero_stage", "dp_world_size"  # in `extra`: which stage, for how many ranks
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STAGE = 2  # if no other is asked for
_STATES = ("master", *_MOMENTS)
_SUB_GROUP_NUMEL = 1_000_000_000  # of a rank's parts: DeepSpeed's sub_group_size, if the config says no other

Groups = list[dict[str, Shape]]


def write_deepspeed(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a checkpoint that engines of ZeRO load, of the stage and number of ranks that `about.extra` says.

    DeepSpeed reads partitions by position. So this has to know the groups and their order, which
    `param_shapes` of `about.extra` says where the contents were DeepSpeed's; `latest` is written last.

    Raises Unsupported where they are not known, Incomplete for a parameter that lacks a state.
    """
    check_global(contents.tensors, "deepspeed")
    parts = parts_of(contents)
    work = _Work(
        contents,
        parts,
        _groups(contents, parts),
        _chosen(contents, WORLD, 1),
        _chosen(contents, STAGE, _STAGE),
    )
    if work.stage not in (1, 2, 3):
        raise Unsupported(f"DeepSpeed has the stages 1, 2 and 3 of ZeRO, and none {work.stage}")
    tag = f"global_step{contents.about.step or 0}"
    for rank in range(work.world):
        partitions = Partitions(contents, budget_bytes)
        zero = _divided(work, partitions, rank) if work.stage == 3 else _flat(work, partitions, rank)
        name = f"{_prefix(work)}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        _save(draft, f"{tag}/{name}", {"optimizer_state_dict": zero, "ds_version": work.version}, partitions)
        if work.stage == 3:
            partitions = Partitions(contents, budget_bytes)
            path = f"{tag}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            _save(draft, path, _model_of_rank(work, partitions, rank), partitions)
    if work.stage != 3:
        module = {name: later_of(contents, number) for name, number in parts.weights.items()}
        engine = {**_engine(work), "param_shapes": work.groups, "module": module}
        _save(draft, f"{tag}/mp_rank_00_model_states.pt", engine, Partitions(contents, budget_bytes))
    with draft.writing("latest") as file:
        file.write(tag.encode())


@dataclass(frozen=True, slots=True)
class _Work:
    """What is written: `groups` are the optimizer's, in its order."""

    contents: Contents
    parts: Parts
    groups: Groups
    world: int
    stage: int

    @property
    def zero(self) -> Mapping[str, Any]:
        """What ZeRO said of itself where the contents come from."""
        said = self.contents.about.extra.get("zero")
        return said if isinstance(said, dict) else {}

    @property
    def hyper(self) -> list[dict[str, Any]]:
        """The options of each group."""
        told = hyper_of(self.contents)
        return told if len(told) == len(self.groups) else [{} for _ in self.groups]

    @property
    def version(self) -> str:
        """Of DeepSpeed."""
        said = self.zero.get("ds_version") or self.contents.about.extra.get("ds_version", "0.19.8")
        return str(said)

    def step_of(self, members: Mapping[str, Shape]) -> Any:
        """Return the step of a group: a tensor, or a plain number."""
        first = next(iter(members))
        number = self.parts.states[first].get("step")
        if number is not None:
            return later_of(self.contents, number)
        return self.parts.steps.get(first, step_of_groups(self.contents.about))


def _flat(work: _Work, partitions: Partitions, rank: int) -> dict[str, Any]:
    """Return what ZeRO-1 or 2 keeps of one rank. The padding of masters is not saved; that of moments is."""
    flats: dict[str, list[Partition]] = {
        state: [flat_partition(work.parts, state, members, (rank, work.world)) for members in work.groups]
        for state in _STATES
    }
    masters = [Partition(one.runs, 0) for one in flats["master"]]
    state = {}
    for group, members in enumerate(work.groups):
        moments = {name: partitions.later(flats[name][group]) for name in _MOMENTS}
        state[group] = {**moments, "step": work.step_of(members)}
    return {
        "dynamic_loss_scale": work.zero.get("dynamic_loss_scale", False),
        "overflow": False,
        "clip_grad": work.zero.get("clip_grad", 0.0),
        "base_optimizer_state": {
            "state": state,
            "param_groups": [{**one, "params": [group]} for group, one in enumerate(work.hyper)],
        },
        FLAT: [partitions.later(one) for one in masters],
        "zero_stage": work.stage,
        "group_paddings": [one.num_zeros for one in flats["master"]],
        "param_alignment_paddings": [[0] * len(members) for members in work.groups],
        "partition_count": [work.world] * len(work.groups),
        "ds_version": work.version,
    }


def _divided(work: _Work, partitions: Partitions, rank: int) -> dict[str, Any]:
    """Return what ZeRO-3 keeps of one rank: each parameter's part, padding and all, by sub-groups."""
    state: dict[int, dict[str, Any]] = {}
    masters, hyper = [], []
    for members, options in zip(work.groups, work.hyper, strict=True):
        first = len(state)
        for sub_group in _sub_groups(work, members):
            made = {
                name: partitions.later(divided_partition(work.parts, name, sub_group, (rank, work.world)))
                for name in _STATES
            }
            masters.append(made.pop("master"))
            state[len(state)] = {"step": work.step_of(sub_group), **made}
        hyper.append({**options, "params": [*range(first, len(state))]})
    return {
        "zero_stage": work.stage,
        "loss_scaler": _loss_scaler(work),
        "dynamic_loss_scale": work.zero.get("dynamic_loss_scale", False),
        "overflow": False,
        "partition_count": work.world,
        "optimizer_state_dict": {"state": state, "param_groups": hyper},
        FLAT_3: masters,
    }


def _sub_groups(work: _Work, members: Mapping[str, Shape]) -> Groups:
    """Cut a group as DeepSpeed does: a sub-group ends where a rank's parts reach the limit."""
    config = work.contents.about.extra.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    said = zero.get("sub_group_size") if isinstance(zero, dict) else None
    limit = said if type(said) is int and said > 0 else _SUB_GROUP_NUMEL
    found: Groups = [{}]
    reached = 0
    for name, shape in members.items():
        if reached >= limit:
            found.append({})
            reached = 0
        found[-1][name] = shape
        reached += -(-math.prod(shape) // work.world)
    return found


def _model_of_rank(work: _Work, partitions: Partitions, rank: int) -> dict[str, Any]:
    """Return a rank's model states of ZeRO-3: weights are empty there, but for buffers and frozen parts."""
    engine, tensors, weights = _engine(work), work.contents.tensors, work.parts.weights
    whole = set(engine["buffer_names"] or ())
    frozen = sorted(weights.keys() - work.parts.states.keys() - whole - set(engine["shared_params"] or ()))
    module = {
        name: later_of(work.contents, number) if name in whole else Later(-1, tensors[number].dtype, (0,))
        for name, number in weights.items()
    }
    return {
        **engine,
        "param_shapes": [sub for members in work.groups for sub in _sub_groups(work, members)],
        "frozen_param_shapes": {name: tensors[weights[name]].shape for name in frozen} or None,
        "frozen_param_fragments": {
            name: partitions.later(
                frozen_partition(tensors[weights[name]], weights[name], (rank, work.world))
            )
            for name in frozen
        }
        or None,
        "module": module,
    }


def _engine(work: _Work) -> dict[str, Any]:
    engine = {**engine_of(work.contents, work.parts), WORLD: work.world}
    engine.pop(STAGE, None)
    return engine


def _loss_scaler(work: _Work) -> LossScaler:
    """Return the object that engines of ZeRO-3 take over. Raises Unsupported."""
    if any(work.contents.tensors[number].dtype == "float16" for number in work.parts.weights.values()):
        raise Unsupported(
            "an engine of ZeRO-3 takes over the loss scaler of fp16 as an object of DeepSpeed's: write "
            "deepspeed-universal, which engines of any stage load"
        )
    return LossScaler()


def _chosen(contents: Contents, key: str, default: int) -> int:
    number = contents.about.extra.get(key, default)
    if type(number) is not int or number < 1:
        raise Unsupported(f"a checkpoint of ZeRO has at least one rank and stage: {key} cannot be {number!r}")
    return number


def _groups(contents: Contents, parts: Parts) -> Groups:
    """Return the parameters of each of the optimizer's groups, in its order."""
    said = contents.about.extra.get("param_shapes")
    groups = [
        {str(name): check_shape(shape, str(name)) for name, shape in group.items()}
        for group in (said if isinstance(said, list) else [])
        if isinstance(group, dict)
    ]
    zero = contents.about.extra.get("zero")
    hyper = zero.get("param_groups") if isinstance(zero, dict) else None
    groups = merged(groups, hyper) if isinstance(hyper, list) else groups
    names = [name for group in groups for name in group]
    if sorted(names) != sorted(parts.states) or (hyper and len(hyper) != len(groups)):
        raise Unsupported(
            "DeepSpeed reads ZeRO's partitions by position, and the order of this model's parameters and "
            "groups is not known: write deepspeed-universal, which goes by names"
        )
    for name in names:
        missing = sorted({*_STATES} - parts.states[name].keys())
        if missing:
            raise Incomplete(f"the parameter {name!r} lacks {missing}, which a checkpoint of ZeRO has")
        for number in parts.states[name].values():
            if contents.tensors[number].shape and contents.tensors[number].dtype not in ROUNDED:
                raise Unsupported(f"{contents.tensors[number]} is no floating tensor of 16 or 32 bits")
    return groups


def _prefix(work: _Work) -> str:
    states, weights = work.parts.states, work.parts.weights
    dtypes = {work.contents.tensors[number].dtype for name, number in weights.items() if name in states}
    return "bf16_" if "bfloat16" in dtypes else ""


def _save(draft: Draft, path: str, tree: Any, partitions: Partitions) -> None:
    if path not in draft.kept:
        with draft.writing(path) as file:
            Saving(tree, NAMES).write(file, partitions.blocks)
