"""Which files a checkpoint of Megatron-LM has: iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt.

The folders' numbers do not say which axis they count; the arguments within do, and how many there are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.interop.formats.archive import Archive, read_archive
from checkpoint.interop.formats.megatron_arguments import arguments_of
from checkpoint.interop.formats.megatron_stages import chunk_keys
from checkpoint.interop.place import Place

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
AXES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
}
_PATH = re.compile(rf"((?:[^/]+/)?)mp_rank_([0-9]{{2,}}(?:_[0-9]{{3,}}){{0,2}})/{re.escape(FILE)}")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The file of one place on the axes."""

    path: str
    at: Mapping[str, int]
    archive: Archive

    @property
    def tree(self) -> Mapping[str, Any]:
        """What it holds."""
        found: Mapping[str, Any] = self.archive.tree
        return found


def looks_like_megatron(files: Mapping[str, int]) -> bool:
    """Tell whether a directory is a legacy checkpoint of Megatron-LM, or one of its iterations."""
    return any(_PATH.fullmatch(path) for path in files)


def find_files(place: Place) -> tuple[dict[str, int], list[ShardFile]]:
    """Return how many ranks there are on each axis, and the file of each.

    Raises Incomplete or Corrupt naming a file that is missing, too many, or of another save.
    """
    prefix = _prefix(place)
    found = {
        tuple(int(number) for number in match[2].split("_")): path
        for path in place.files
        for match in [_PATH.fullmatch(path)]
        if match and match[1] == prefix
    }
    if not found:
        raise Incomplete(f"{place} has no {prefix}mp_rank_*/{FILE}")
    archives = {numbers: _read(place, path) for numbers, path in sorted(found.items())}
    first = min(archives)
    axes = axes_of(archives[first].tree, found[first])
    files = []
    for ranks in product(*(range(size) for size in axes.values())):
        at = dict(zip(axes, ranks, strict=True))
        numbers = _numbers(axes, at)
        if numbers not in archives:
            raise Incomplete(f"{place} has no file of {at}, one of {axes} ranks by the arguments in it")
        files.append(ShardFile(found[numbers], at, archives.pop(numbers)))
    if archives:
        raise Corrupt(f"{found[min(archives)]} in {place} is of none of the {axes} ranks: of another world?")
    _check_same(files)
    return axes, files


def axes_of(tree: Mapping[str, Any], path: str) -> dict[str, int]:
    """Return how many ranks of each axis there are; the expert's only if there are several."""
    arguments = arguments_of(tree)
    sizes = {axis: arguments.get(key, 1) for axis, key in AXES.items()}
    if any(type(size) is not int or not 1 <= size <= 1 << 16 for size in sizes.values()):
        raise Corrupt(f"{path}: its arguments do not say how many ranks there are, but {sizes}")
    return {axis: size for axis, size in sizes.items() if axis != "expert" or size > 1}


def folder_of(axes: Mapping[str, int], at: Mapping[str, int]) -> str:
    """Return the name of a rank's folder."""
    first, *rest = _numbers(axes, at)
    return f"mp_rank_{first:02}" + "".join(f"_{number:03}" for number in rest)


def _numbers(axes: Mapping[str, int], at: Mapping[str, int]) -> tuple[int, ...]:
    """Return the numbers in the name of a rank's folder: those of axes with one rank are not shown."""
    shown = [axis for axis in ("pipeline", "expert") if axes.get(axis, 1) > 1]
    return (at.get("tensor", 0), *(at[axis] for axis in shown))


def tracked_folder(place: Place) -> str | None:
    """Return the folder of the iteration that a directory's tracker names. Raises Corrupt."""
    if TRACKER not in place.files:
        return None
    text = place.read(TRACKER, 0, min(64, place.files[TRACKER])).decode("utf-8", "replace").strip()
    if text != "release" and not (text.isascii() and text.isdecimal()):
        raise Corrupt(f"{TRACKER} in {place} does not say an iteration, but {text!a}")
    return text if text == "release" else f"iter_{int(text):07}"


def _prefix(place: Place) -> str:
    folder = tracked_folder(place)
    if folder is not None:
        return f"{folder}/"
    prefixes = sorted({match[1] for path in place.files for match in [_PATH.fullmatch(path)] if match})
    if len(prefixes) > 1:
        raise Unsupported(f"{place} holds {prefixes[:5]} and no {TRACKER}: give the path of one of them")
    return prefixes[0] if prefixes else ""


def _read(place: Place, path: str) -> Archive:
    archive = read_archive(place, path)
    if not isinstance(archive.tree, dict):
        raise Corrupt(f"{path} in {place} holds no model of Megatron's")
    chunk_keys(archive.tree, f"{path} in {place}")
    return archive


def _check_same(files: Sequence[ShardFile]) -> None:
    """See that all files are of one iteration and one run."""
    first = files[0]
    said = {key: arguments_of(first.tree).get(key) for key in (*AXES.values(), "num_layers", "hidden_size")}
    for file in files[1:]:
        if file.tree.get("iteration") != first.tree.get("iteration"):
            raise Corrupt(
                f"{file.path} is of iteration {file.tree.get('iteration')}, and {first.path} of "
                f"{first.tree.get('iteration')}"
            )
        other = {key: arguments_of(file.tree).get(key) for key in said}
        if other != said:
            raise Corrupt(f"{file.path} is of a run with {other}, and {first.path} of one with {said}")
