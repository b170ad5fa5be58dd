"""DeepSpeed's universal checkpoints: a folder for each parameter, with its fp32 master, moments and step.

(Lian et al., Universal Checkpointing, ATC 2025; DeepSpeed's universal_checkpoint.py.)
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Archive, Stored, read_archive
from checkpoint.interop.formats.contract import About, Array
from checkpoint.interop.formats.deepspeed_files import Folder, RankFile, find_folder, model_files
from checkpoint.interop.formats.deepspeed_parts import Shape, group_shapes, stage_of
from checkpoint.interop.formats.deepspeed_said import (
    check_stateless,
    extra_of,
    hint_of,
    left_of,
    left_states,
    step_of,
)
from checkpoint.interop.formats.deepspeed_state import Collected, Rounded, ZeroCheckpoint, run_of
from checkpoint.interop.formats.deepspeed_steps import read_step
from checkpoint.interop.formats.deepspeed_weights import ModelStates, collect_weights
from checkpoint.interop.formats.masters import check_masters
from checkpoint.interop.formats.tiles import Tile, Tiled
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

STATES = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_FILE = re.compile(r"(?:[^/]+/)?zero/[^/]+/fp32\.pt")
_COMMON = "zero/optimizer_state.pt"


def looks_like_deepspeed_universal(files: Mapping[str, int]) -> bool:
    """Tell whether a directory is a universal checkpoint of DeepSpeed, or the folder of one."""
    return any(_FILE.fullmatch(path) for path in files)


def open_deepspeed_universal(place: Place) -> ZeroCheckpoint:
    """Open a universal checkpoint: the one that `latest_universal` names, or a folder of one.

    Raises Incomplete, Corrupt or Mismatch naming a file that is missing, or of another step or model.
    """
    folder = find_folder(place, "latest_universal")
    models = model_files(folder, 0)
    tree = models[0].archive.tree
    common = _common(folder)
    universal = _Universal(folder, models, common)
    collected = Collected()
    universal.collect(collected)
    about = About(
        "deepspeed-universal",
        {},
        step_of(tree),
        extra_of(tree, common, str(folder)),
        notes=(*left_of(tree), *collected.notes),
    )
    tiled = Tiled(place, about, collected.tensors, collected.tiles)
    check_masters(tiled, str(folder), hint=hint_of(about.extra))
    return ZeroCheckpoint(tiled, collected.rounded)


def _common(folder: Folder) -> Mapping[str, Any]:
    path = folder.prefix + _COMMON
    if path not in folder.place.files:
        raise Incomplete(f"{folder} has no {_COMMON}: its conversion was not finished")
    tree = read_archive(folder.place, path).tree
    if not isinstance(tree, dict):
        raise Corrupt(f"{path} in {folder.place} does not hold an optimizer's common state")
    return tree


@dataclass(frozen=True, slots=True)
class _Universal:
    folder: Folder
    models: Sequence[RankFile]
    common: Mapping[str, Any]

    def collect(self, collected: Collected) -> None:
        """Add its tensors."""
        groups = group_shapes(self.models[0])
        stage = 3 if len(self.models) > 1 or _is_divided(self.models[0]) else stage_of(self.common)
        states = ModelStates(self.models, groups, min(stage, 3), {}, self.folder.place)
        weights = collect_weights(states, collected)
        there = self._names()
        for members in groups:
            steps: dict[str, tuple[Foreign, Array]] = {}
            for name, shape in members.items():
                if name not in there:
                    raise Incomplete(f"{self.folder} has no zero/{name}, which the model states list")
                self._add(collected, name, there[name], (shape, weights))
                step = self._step(name, there)
                if step is not None:
                    steps[name] = step
            self._add_steps(collected, members, steps)
        self._check_states({name: there[name] for members in groups for name in members}, collected)
        known = {name for members in groups for name in members} | {one.name for one in collected.tensors}
        known |= {one.name for one in collected.rounded}
        kinds = {file for files in there.values() for file in files} - {*STATES.values(), "step"}
        collected.notes += left_states(kinds)
        strange = sorted(there.keys() - known)
        if strange:
            raise Corrupt(f"{self.folder} has zero/{strange[0]}, which the model does not: of another model?")

    def _check_states(self, there: Mapping[str, set[str]], collected: Collected) -> None:
        """See that all parameters have states, or none if the optimizer keeps none. Raises Incomplete."""
        without = [name for name, files in there.items() if not files - {"fp32", "step"}]
        if without and len(without) < len(there):
            raise Incomplete(f"{self.folder} has no states of {without[0]!r} but its master, and others have")
        if without:
            tree = self.models[0].archive.tree
            collected.notes.append(check_stateless(tree, self.common, str(self.folder)))

    def _names(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in self.folder.names:
            parts = name.split("/")
            if len(parts) == 3 and parts[0] == "zero" and parts[2].endswith(".pt"):
                found.setdefault(parts[1], set()).add(parts[2].removesuffix(".pt"))
        return found

    def _add(
        self,
        collected: Collected,
        name: str,
        files: set[str],
        said: tuple[Shape, Mapping[str, Mapping[str, str]]],
    ) -> None:
        shape, weights = said
        for state, file in STATES.items():
            if file not in files:
                if state == "master" or len(files & set(STATES.values())) > 1:
                    raise Incomplete(f"{self.folder} has no zero/{name}/{file}.pt")
                continue
            archive, stored = self._stored(f"zero/{name}/{file}.pt")
            if math.prod(stored.shape) != math.prod(shape):
                raise Mismatch(
                    f"zero/{name}/{file}.pt in {self.folder} has the shape {stored.shape}, the model says "
                    f"{shape}: is it of another model, or of several tensor-parallel ranks?"
                )
            find = partial(archive.locate, stored)
            tensor = Foreign(f"optimizer.{state}.{name}", stored.dtype, shape)
            collected.add(tensor, [Tile(Box.whole(shape), partial(run_of, find, 0, shape))])
            if state == "master":
                number = len(collected.tensors) - 1
                collected.rounded += [Rounded(one, to, number) for one, to in weights.get(name, {}).items()]

    def _stored(self, name: str) -> tuple[Archive, Stored]:
        archive = read_archive(self.folder.place, self.folder.prefix + name)
        tensor = archive.tree.get("param") if isinstance(archive.tree, dict) else archive.tree
        if not isinstance(tensor, Stored) or tensor.dtype != "float32":
            raise Corrupt(f"{name} in {self.folder} does not hold an fp32 tensor")
        return archive, tensor

    def _step(self, name: str, there: Mapping[str, set[str]]) -> tuple[Foreign, Array] | None:
        """Return a parameter's step; folders that ZeRO-3 was converted to have one for all of them."""
        if any("step" in files for files in there.values()):
            if "step" not in there[name]:
                raise Incomplete(f"{self.folder} has no zero/{name}/step.pt, and others have")
            path = f"{self.folder.prefix}zero/{name}/step.pt"
            archive = read_archive(self.folder.place, path)
            return read_step(self.folder.place, archive, archive.tree, path)
        path = self.folder.prefix + _COMMON
        base = self.common.get("optimizer_state_dict")
        table = base.get("state") if isinstance(base, dict) else None
        state = table.get(0) if isinstance(table, dict) else None
        if not isinstance(state, dict) or "step" not in state:
            return None
        return read_step(self.folder.place, read_archive(self.folder.place, path), state["step"], path)

    def _add_steps(
        self, collected: Collected, members: Mapping[str, Shape], steps: Mapping[str, tuple[Foreign, Array]]
    ) -> None:
        """Add the steps of a group, which are the same. Raises Corrupt naming one that is not as most are."""
        usual = Counter(bits.tobytes() for _, bits in steps.values()).most_common(1)
        for name in members if usual else ():
            if steps[name][1].tobytes() != usual[0][0]:
                raise Corrupt(
                    f"zero/{name}/step.pt in {self.folder} is of another step than the rest of its group"
                )
            tensor, bits = steps[name]
            named = Foreign(f"optimizer.step.{name}", tensor.dtype, ())
            collected.add(named, [Tile(Box((), ()), partial(_same, bits))])


def _same(bits: Array) -> Array:
    return bits


def _is_divided(model: RankFile) -> bool:
    """Tell whether a file of model states is of ZeRO-3: its parameters are empty there."""
    module = model.archive.tree.get("module")
    shapes = {name: shape for members in group_shapes(model) for name, shape in members.items()}
    tensors = module if isinstance(module, dict) else {}
    return any(
        isinstance(each, Stored) and each.shape != shapes.get(name, each.shape)
        for name, each in tensors.items()
    )
