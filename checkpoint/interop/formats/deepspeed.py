"""DeepSpeed's ZeRO checkpoints: every parameter put together again from what the ranks hold, read by ranges.

(Rajbhandari et al., ZeRO, SC 2020; the files are described in DeepSpeed's zero_to_fp32.py and
ds_to_universal.py.)
"""

import math
import re
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
    check_cut,
    check_names,
    engine_tree,
    find_folder,
    looks_like_zero,
    model_files,
    optimizer_files,
    with_ties,
)
from checkpoint.interop.formats.deepspeed_parts import (
    FLAT,
    FLAT_3,
    Fragment,
    Shape,
    check_padding,
    fragments_of,
    group_shapes,
    stage_of,
    zero_of,
)
from checkpoint.interop.formats.deepspeed_said import (
    check_order,
    check_stateless,
    extra_of,
    is_decoupled,
    is_offloaded,
    left_of,
    left_states,
    notes_of,
    num_cut,
    options_by_number,
    states_by_number,
    step_of,
    without_cut,
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
_UNDIVIDED = re.compile(r"(?:[^/]+/)?mp_rank_[0-9]+_model_states\.pt")
_DIVIDED = 3  # the stage that divides each parameter alone, and deals none round robin


def looks_like_deepspeed(files: Mapping[str, int]) -> bool:
    """Tell whether a directory is a DeepSpeed checkpoint of ZeRO, or the folder of one of its tags."""
    return looks_like_zero(files)


def hint_without_zero(place: Place) -> str:
    """Tell what to do with model states that no states of ZeRO lie beside; empty where there are none.

    Raises Incomplete or Unsupported where it cannot be told which tag is meant.
    """
    if looks_like_zero(place.files) or not any(_UNDIVIDED.fullmatch(path) for path in place.files):
        return ""
    folder = find_folder(place, "latest")
    found = sorted(name for name in folder.names if _UNDIVIDED.fullmatch(name))
    told = f"{folder} holds DeepSpeed's model states and no *_optim_states.pt of ZeRO, which is not read. "
    if len(found) != 1 or any(name.startswith("layer_") for name in folder.names):
        return f"{told}Each file has a part of the model: put it together with DeepSpeed, or save with ZeRO"
    return (
        f"{told}If it was trained without ZeRO (stage 0), give the path of {folder.prefix}{found[0]}: it is "
        "read as a file of torch.save, the weights and the optimizer of fp32 training (--by-order where that "
        "only counts its parameters). What optimizers of 16-bit training keep stays as it is, as no "
        "parameter's state"
    )


def open_deepspeed(place: Place) -> ZeroCheckpoint:
    """Open a checkpoint of ZeRO-1, 2 or 3: the tag that `latest` names, or the folder of a tag.

    Fp32 parameters are "optimizer.master.NAME"; NAME is the 16-bit weight that the model computes with. Files
    of ZeRO-3 do not hold it: it is the master rounded to nearest, as DeepSpeed itself makes it.

    Raises Incomplete or Corrupt naming a file that is missing, there twice, or of another step or world.
    """
    folder = find_folder(place, "latest")
    files = optimizer_files(folder)
    if not files:
        raise Incomplete(hint_without_zero(place) or f"{folder} has no *_optim_states.pt")
    collected = Collected()
    models = sorted({file.model for file in files})
    trees: list[Mapping[str, Any]] = []
    for model in models:
        at = {"tensor": model} if len(models) > 1 else {}
        mine, states = [file for file in files if file.model == model], model_files(folder, model)
        trees.append(engine_tree(states[0]))
        check_cut(folder, models, num_cut(trees[0]))
        if step_of(trees[-1]) != step_of(trees[0]):
            raise Corrupt(f"{states[0].path} is of another step than the files of the other ranks")
        _ModelRank(folder, mine, with_ties(states, trees[0]), at).collect(collected)
        check_names(folder, (*mine, *states))
    zero, tree = zero_of(files[0]), trees[0]
    extra = extra_of(tree, zero, str(folder))
    about = About(
        "deepspeed",
        {"tensor": len(models)} if len(models) > 1 else {},
        step_of(tree),
        without_cut(extra) if len(models) > 1 else extra,
        notes=(*notes_of(zero, len(files) // len(models)), *left_of(tree), *dict.fromkeys(collected.notes)),
    )
    if stage_of(zero) < _DIVIDED and len(files) > len(models):
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
            self._check_padding(flats["exp_avg"])
        else:
            collected.notes.append(check_stateless(self._tree, self._zeros[0], str(self._folder)))
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

    @property
    def _tree(self) -> Mapping[str, Any]:
        return engine_tree(self._models[0])

    def _check_padding(self, flats: Sequence[Sequence[Any]]) -> None:
        """See that the moments of ZeRO-3 are zero where they are padded, which they are without L2 decay."""
        options = options_by_number(self._zeros[0])
        if self._stage == _DIVIDED and len(options) == len(self._shapes) and not is_offloaded(self._tree):
            undecayed = [group for group, one in enumerate(options) if is_decoupled(one)]
            check_padding(self._folder.place, self._files, flats, {n: self._shapes[n] for n in undecayed})

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
        there = [_holds_states(self._base(number)) for number in range(len(self._files))]
        if any(there) and not all(there):
            raise Incomplete(
                f"{self._files[there.index(False)].path} has no optimizer state, and others have"
            )
        return all(there)

    def _states(self, number: int) -> list[dict[str, Any]]:
        """Return a rank's optimizer state of every group. Raises Incomplete."""
        table = states_by_number(self._base(number))
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


def _holds_states(base: Any) -> bool:
    """Tell whether an optimizer has any state but its steps: SGD without momentum has none."""
    states = [state for state in states_by_number(base).values() if isinstance(state, dict)]
    return any(value is not None for state in states for key, value in state.items() if key != "step")


def _group_step(base: Any, group: int) -> Any:
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or group >= len(groups) or not isinstance(groups[group], dict):
        return None
    return groups[group].get("step")
