"""Writes DeepSpeed's ZeRO-1 and 2 checkpoints: one flat partition of every group for each rank."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint.errors import Incomplete, Unsupported
from checkpoint.format.box import boxes_of_run, split_box
from checkpoint.format.flat import plan_flat
from checkpoint.format.layout import FlatGroup
from checkpoint.interop.drafts import Draft
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.deepspeed_parts import FLAT, Shape
from checkpoint.interop.formats.deepspeed_writing import Parts, engine_of, parts_of
from checkpoint.interop.formats.extents import check_shape
from checkpoint.interop.formats.rounding import ROUNDED, widen_bits
from checkpoint.interop.formats.saving import Later, Saving
from checkpoint.interop.formats.streams import block_bytes, blocks_of, check_global

_ALIGNMENT = 2  # elements to which DeepSpeed aligns each rank's partition (nccl_start_alignment_factor)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STAGE = 2


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements first, ..., stop - 1 of a tensor of the contents, raveled."""

    number: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Partition:
    """A rank's partition of one state of a group: runs end to end, and zeros after them."""

    runs: tuple[_Run, ...]
    num_zeros: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return sum(run.stop - run.first for run in self.runs) + self.num_zeros


def write_deepspeed(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a checkpoint that engines of ZeRO stage 1 or 2 load, for `dp_world_size` ranks of `about.extra`.

    DeepSpeed reads partitions by position. So this has to know the groups and their order, which
    `param_shapes` of `about.extra` says where the contents were DeepSpeed's; `latest` is written last.

    Raises Unsupported where they are not known, Incomplete for a parameter that lacks a state.
    """
    check_global(contents.tensors, "deepspeed")
    parts = parts_of(contents.tensors)
    groups = _groups(contents, parts)
    world = contents.about.extra.get("dp_world_size", 1)
    if type(world) is not int or world < 1:
        raise Unsupported(f"a checkpoint of ZeRO is for at least one rank, not for {world!r}")
    tag = f"global_step{contents.about.step or 0}"
    for rank in range(world):
        partitions = _Partitions(contents, budget_bytes)
        zero = _zero(contents, parts, partitions, (groups, rank, world))
        name = f"{_prefix(contents, parts)}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        _save(
            draft,
            f"{tag}/{name}",
            {"optimizer_state_dict": zero, "ds_version": zero["ds_version"]},
            partitions,
        )
    later = {name: _later(contents, number) for name, number in parts.weights.items()}
    engine = {**engine_of(contents, parts), "dp_world_size": world, "param_shapes": groups, "module": later}
    _save(draft, f"{tag}/mp_rank_00_model_states.pt", engine, _Partitions(contents, budget_bytes))
    with draft.writing("latest") as file:
        file.write(tag.encode())


class _Partitions:
    """The blocks of what a file holds: partitions by the number that they were given, or tensors."""

    def __init__(self, contents: Contents, budget_bytes: int) -> None:
        self._contents, self._budget_bytes = contents, budget_bytes
        self._partitions: dict[int, _Partition] = {}

    def later(self, partition: _Partition) -> Later:
        """Return a partition as a tensor to write; tensors of the contents have their own numbers."""
        number = len(self._contents.tensors) + len(self._partitions)
        self._partitions[number] = partition
        return Later(number, "float32", (partition.numel,))

    def blocks(self, number: int) -> Iterator[memoryview]:
        """Yield the bytes of a partition, or of a tensor of the contents."""
        if number not in self._partitions:
            yield from blocks_of(self._contents, number, self._budget_bytes)
            return
        partition = self._partitions[number]
        for run in partition.runs:
            tensor = self._contents.tensors[run.number]
            for whole in boxes_of_run(tensor.shape, run.first, run.stop):
                for box in split_box(whole, 4, block_bytes(self._budget_bytes)):
                    bits = widen_bits(self._contents.read(run.number, box), tensor.dtype)
                    yield memoryview(bits.reshape(-1).view("u1").data)
        if partition.num_zeros:
            yield memoryview(np.zeros(4 * partition.num_zeros, "u1").data)


def _zero(
    contents: Contents,
    parts: Parts,
    partitions: _Partitions,
    where: tuple[Sequence[Mapping[str, Shape]], int, int],
) -> dict[str, Any]:
    """Return what ZeRO keeps of one rank. The padding of masters is not saved; that of moments is."""
    groups, rank, world = where
    flats: dict[str, list[_Partition]] = {
        state: [_partition(parts, state, members, (rank, world)) for members in groups]
        for state in ("master", *_MOMENTS)
    }
    masters = [_Partition(one.runs, 0) for one in flats["master"]]
    said = contents.about.extra.get("zero")
    zero: Mapping[str, Any] = said if isinstance(said, dict) else {}
    state = {}
    for group, members in enumerate(groups):
        step = parts.states[next(iter(members))].get("step")
        moments = {name: partitions.later(flats[name][group]) for name in _MOMENTS}
        state[group] = {**moments, "step": _later(contents, step) if step is not None else 0}
    hyper = [dict(one) for one in zero.get("param_groups") or [{} for _ in groups]]
    return {
        "dynamic_loss_scale": zero.get("dynamic_loss_scale", False),
        "overflow": False,
        "clip_grad": zero.get("clip_grad", 0.0),
        "base_optimizer_state": {
            "state": state,
            "param_groups": [{**one, "params": [group]} for group, one in enumerate(hyper)],
        },
        FLAT: [partitions.later(one) for one in masters],
        "zero_stage": _STAGE,
        "group_paddings": [one.num_zeros for one in flats["master"]],
        "param_alignment_paddings": [[0] * len(members) for members in groups],
        "partition_count": [world] * len(groups),
        "ds_version": zero.get("ds_version") or contents.about.extra.get("ds_version", "0.19.8"),
    }


def _partition(parts: Parts, state: str, members: Mapping[str, Shape], place: tuple[int, int]) -> _Partition:
    rank, world = place
    plan = plan_flat(
        FlatGroup(tuple(members), ("shard",), part_multiple=_ALIGNMENT),
        {name: math.prod(shape) for name, shape in members.items()},
        world,
    )
    begin, runs = rank * plan.part_length, []
    for name, shape in members.items():
        first = max(0, begin - plan.starts[name])
        stop = min(math.prod(shape), begin + plan.part_length - plan.starts[name])
        if first < stop:
            runs.append(_Run(parts.states[name][state], first, stop))
    held = sum(run.stop - run.first for run in runs)
    return _Partition(tuple(runs), plan.part_length - held)


def _groups(contents: Contents, parts: Parts) -> list[dict[str, Shape]]:
    """Return the parameters of each of the optimizer's groups, in its order."""
    said = contents.about.extra.get("param_shapes")
    groups = [
        {str(name): check_shape(shape, str(name)) for name, shape in group.items()}
        for group in (said if isinstance(said, list) else [])
        if isinstance(group, dict)
    ]
    zero = contents.about.extra.get("zero")
    hyper = zero.get("param_groups") if isinstance(zero, dict) else None
    names = [name for group in groups for name in group]
    if sorted(names) != sorted(parts.states) or (hyper and len(hyper) != len(groups)):
        raise Unsupported(
            "DeepSpeed reads ZeRO's partitions by position, and the order of this model's parameters and "
            "groups is not known: write deepspeed-universal, which goes by names"
        )
    for name in names:
        missing = sorted({"master", *_MOMENTS} - parts.states[name].keys())
        if missing:
            raise Incomplete(f"the parameter {name!r} lacks {missing}, which a checkpoint of ZeRO has")
        for number in parts.states[name].values():
            if contents.tensors[number].shape and contents.tensors[number].dtype not in ROUNDED:
                raise Unsupported(f"{contents.tensors[number]} is no floating tensor of 16 or 32 bits")
    return groups


def _prefix(contents: Contents, parts: Parts) -> str:
    dtypes = {
        contents.tensors[number].dtype for name, number in parts.weights.items() if name in parts.states
    }
    return "bf16_" if "bfloat16" in dtypes else ""


def _later(contents: Contents, number: int) -> Later:
    tensor = contents.tensors[number]
    return Later(number, tensor.dtype, tensor.shape)


def _save(draft: Draft, path: str, tree: Any, partitions: _Partitions) -> None:
    if path not in draft.kept:
        with draft.writing(path) as file:
            Saving(tree).write(file, partitions.blocks)
