"""DeepSpeed's ZeRO checkpoints: every parameter put together again from what the ranks hold, read by ranges.

(Rajbhandari et al., ZeRO, SC 2020; the files are described in DeepSpeed's zero_to_fp32.py and
ds_to_universal.py.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from checkpoint.errors import Corrupt, Incomplete
from checkpoint.format.box import Box, boxes_of_run
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.contract import About, Array
from checkpoint.interop.formats.deepspeed_files import (
    Folder,
    RankFile,
    find_folder,
    looks_like_zero,
    model_files,
    optimizer_files,
)
from checkpoint.interop.formats.deepspeed_parts import (
    FLAT,
    FLAT_3,
    Fragment,
    Shape,
    fragments_of,
    group_shapes,
    stage_of,
    zero_of,
)
from checkpoint.interop.formats.deepspeed_said import (
    check_order,
    extra_of,
    left_of,
    left_states,
    notes_of,
    step_of,
)
from checkpoint.interop.formats.deepspeed_state import Collected, Rounded, ZeroCheckpoint, run_of
from checkpoint.interop.formats.deepspeed_steps import read_step
from checkpoint.interop.formats.deepspeed_weights import ModelStates, collect_weights
from checkpoint.interop.formats.masters import check_masters
from checkpoint.interop.formats.tiles import Tile, Tiled
from checkpoint.interop.formats.twins import Samples, check_distinct
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

MOMENTS = ("exp_avg", "exp_avg_sq")
_ORDERED = 3  # the stage that deals no parameters round robin


def looks_like_deepspeed(files: Mapping[str, int]) -> bool:
    """Tell whether a directory is a DeepSpeed checkpoint of ZeRO, or the folder of one of its tags."""
    return looks_like_zero(files)


def open_deepspeed(place: Place) -> ZeroCheckpoint:
    """Open a checkpoint of ZeRO-1, 2 or 3: the tag that `latest` names, or the folder of a tag.

    Fp32 parameters are "optimizer.master.NAME"; NAME is the 16-bit weight that the model computes with. Files
    of ZeRO-3 do not hold it: it is the master rounded to nearest, as DeepSpeed itself makes it.

    Raises Incomplete or Corrupt naming a file that is missing, there twice, or of another step or world.
    """
    folder = find_folder(place, "latest")
    files = optimizer_files(folder)
    if not files:
        raise Incomplete(f"{folder} has no *_optim_states.pt")
    collected = Collected()
    models = sorted({file.model for file in files})
    trees = []
    for model in models:
        at = {"tensor": model} if len(models) > 1 else {}
        mine, states = [file for file in files if file.model == model], model_files(folder, model)
        _ModelRank(folder, mine, states, at).collect(collected)
        trees.append(states[0].archive.tree)
    zero, tree = zero_of(files[0]), trees[0]
    about = About(
        "deepspeed",
        {"tensor": len(models)} if len(models) > 1 else {},
        step_of(tree),
        extra_of(tree, zero, str(folder)),
        notes=(*notes_of(zero, len(files) // len(models)), *left_of(tree), *dict.fromkeys(collected.notes)),
    )
    if stage_of(zero) < _ORDERED and len(files) > len(models):
        check_order(about.extra, str(folder))
    tiled = Tiled(place, about, collected.tensors, collected.tiles)
    check_masters(tiled, str(folder), list(collected.parts.values()))
    return ZeroCheckpoint(tiled, collected.rounded)


class _ModelRank:
    """The files of one model-parallel rank: the model is whole in them, divided among data-parallel ranks."""

    def __init__(
        self, folder: Folder, files: Sequence[RankFile], models: Sequence[RankFile], at: Mapping[str, int]
    ) -> None:
        self._folder, self._files, self._models, self._at = folder, files, models, at
        self._zeros = [zero_of(file) for file in files]
        self._stage = stage_of(self._zeros[0])
        self._shapes = group_shapes(models[0])
        self._check_world()
        for model in models[1:]:
            if group_shapes(model) != self._shapes:
                raise Corrupt(f"{model.path} lists other parameters than {models[0].path}: of another save?")

    def collect(self, collected: Collected) -> None:
        """Add its tensors. Raises Corrupt, Incomplete."""
        fragments = fragments_of(self._files, self._shapes, self._stage)
        flats = {"master": [self._flats(zero) for zero in self._zeros]}
        steps: list[Any] = []
        if self._has_states():
            states = [self._states(number) for number in range(len(self._files))]
            for moment in MOMENTS:
                flats[moment] = [[group.get(moment) for group in rank] for rank in states]
            steps = self._steps(states)
            kinds = {str(kind) for rank in states for group in rank for kind in group}
            collected.notes += left_states(kinds - {*MOMENTS, "step"})
        check_distinct(
            self._folder.place, [self._samples(number, flats) for number in range(len(self._files))]
        )
        states_of_model = ModelStates(self._models, self._shapes, self._stage, self._at, self._folder.place)
        weights = collect_weights(states_of_model, collected)
        for group, members in enumerate(self._shapes):
            for name, shape in members.items():
                for state, parts in flats.items():
                    tensor = Foreign(f"optimizer.{state}.{name}", "float32", shape, self._at)
                    collected.add(tensor, list(self._tiles(fragments.get(name, []), parts, shape)))
                    if state == "master":
                        number = len(collected.tensors) - 1
                        self._see(fragments.get(name, []), shape, collected)
                        collected.rounded += [
                            Rounded(one, dtype, number) for one, dtype in weights.get(name, {}).items()
                        ]
                if steps:
                    step = replace(steps[group][0], name=f"optimizer.step.{name}")
                    collected.add(replace(step, at=self._at), steps[group][1])

    def _see(self, fragments: Sequence[Fragment], shape: Shape, collected: Collected) -> None:
        for one in fragments:
            for box in boxes_of_run(shape, one.first, one.first + one.numel):
                collected.seen_in(self._files[one.file].path, one.group, box)

    def _check_world(self) -> None:
        for file, zero in zip(self._files, self._zeros, strict=True):
            count = zero.get("partition_count")
            counts = count if isinstance(count, list) else [count]
            if any(type(each) is int and each != len(self._files) for each in counts):
                raise Incomplete(
                    f"{file.path} was saved by {max(counts)} ranks, and {self._folder} has the files of "
                    f"{len(self._files)}: some are missing, or left from another world"
                )
            if stage_of(zero) != self._stage:
                raise Corrupt(f"{file.path} is of ZeRO stage {stage_of(zero)}, others of {self._stage}")
        if self._stage == 3 and len(self._models) != len(self._files):
            raise Incomplete(
                f"{self._folder} has model states of {len(self._models)} of {len(self._files)} ranks"
            )

    def _flats(self, zero: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = zero[FLAT_3 if self._stage == 3 else FLAT]
        return found

    def _base(self, number: int) -> Any:
        zero = self._zeros[number]
        return zero.get("optimizer_state_dict" if self._stage == 3 else "base_optimizer_state")

    def _has_states(self) -> bool:
        there = [bool(_state_table(self._base(number))) for number in range(len(self._files))]
        if any(there) and not all(there):
            raise Incomplete(
                f"{self._files[there.index(False)].path} has no optimizer state, and others have"
            )
        return all(there)

    def _states(self, number: int) -> list[dict[str, Any]]:
        """Return a rank's optimizer state of every group. Raises Incomplete."""
        table = _state_table(self._base(number))
        found = [table.get(group) for group in range(len(self._shapes))]
        for group, state in enumerate(found):
            if not isinstance(state, dict) or any(moment not in state for moment in MOMENTS):
                raise Incomplete(
                    f"{self._files[number].path} lacks the moments of group {group}: is it Adam's?"
                )
        return [state for state in found if isinstance(state, dict)]

    def _steps(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[Foreign, list[Tile]]]:
        """Return the optimizer's step of every group, the same on all ranks. Raises Corrupt."""
        found = []
        for group in range(len(self._shapes)):
            known: tuple[Foreign, Array] | None = None
            for number, state in enumerate(states):
                step = self._step(number, group, state[group])
                if known is not None and (known[0] != step[0] or not np.array_equal(known[1], step[1])):
                    raise Corrupt(
                        f"{self._files[number].path} is of another step than {self._files[0].path}: the "
                        f"optimizer's steps of group {group} differ"
                    )
                known = step
            if known is not None:
                found.append((known[0], [Tile(Box((), ()), partial(_same, known[1]))]))
        return found

    def _step(self, number: int, group: int, state: Mapping[str, Any]) -> tuple[Foreign, Array]:
        step = state.get("step", self._zeros[number].get("base_optimizer_state_step"))
        if step is None:
            step = _group_step(self._base(number), group)
        file = self._files[number]
        return read_step(self._folder.place, file.archive, step, file.path)

    def _samples(self, number: int, flats: Mapping[str, Sequence[Sequence[Any]]]) -> Samples:
        """Return a rank's partitions of the masters and moments."""
        stored = [flat for parts in flats.values() for flat in parts[number] if isinstance(flat, Stored)]
        return Samples(self._files[number].path, self._files[number].archive, stored)

    def _tiles(
        self, fragments: Sequence[Fragment], parts: Sequence[Sequence[Any]], shape: Shape
    ) -> Iterator[Tile]:
        """Yield the boxes of a parameter that each fragment holds."""
        for fragment in fragments:
            flat, file = parts[fragment.file][fragment.group], self._files[fragment.file]
            if not isinstance(flat, Stored) or flat.dtype != "float32" or flat.strides not in ((1,), ()):
                raise Corrupt(f"{file.path}: a partition of group {fragment.group} is no flat fp32 tensor")
            if fragment.start + fragment.numel > math.prod(flat.shape):
                raise Corrupt(
                    f"{file.path}: a moment of group {fragment.group} is shorter than its parameters"
                )
            find = cache(partial(file.archive.locate, flat))
            start = fragment.start
            for box in boxes_of_run(shape, fragment.first, fragment.first + fragment.numel):
                yield Tile(box, partial(run_of, find, start, box.size))
                start += box.numel


def _same(bits: Array) -> Array:
    return bits


def _state_table(base: Any) -> dict[int, Any]:
    """Return an optimizer's states by the number of the group: each group is one flat parameter."""
    if isinstance(base, list):
        return dict(enumerate(base))
    if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
        return {}
    table = base["state"]
    groups = base.get("param_groups")
    if not isinstance(groups, list):
        return dict(table)
    order = [number for group in groups if isinstance(group, dict) for number in group.get("params", ())]
    return {group: table[number] for group, number in enumerate(order) if number in table}


def _group_step(base: Any, group: int) -> Any:
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or group >= len(groups) or not isinstance(groups[group], dict):
        return None
    return groups[group].get("step")
