"""Which files a DeepSpeed checkpoint has: a tag's folder, and one file of each kind for every rank.

A folder may hold files of another save by the same names or of another world; whatever is missing, there
twice, or too many is an error that names it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.interop.formats.archive import Archive, read_archive
from checkpoint.interop.place import Place

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_MODEL = re.compile(r"mp_rank_([0-9]+)_model_states\.pt")
_MODEL_3 = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_model_states\.pt")
_OTHERS = re.compile(r"(layer_[0-9]+.*|expp_rank_.*|.*_expert_.*)_states\.pt")
_LATEST = "latest"
_STEP = re.compile(r"global_step([0-9]{1,18})(?:_universal)?")
_MAX_TAG_BYTES = 4096
_ZIP = b"PK\x03\x04"
_ZIP_HEADER_BYTES = 30
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class RankFile:
    """One rank's file: its place among the data-parallel ranks and the model-parallel ones, and its tree."""

    path: str
    data: int
    model: int
    archive: Archive


@dataclass(frozen=True, slots=True)
class Folder:
    """A tag's folder in a checkpoint's; files by name, without what is beside them."""

    place: Place
    prefix: str

    @property
    def names(self) -> list[str]:
        """The names of its files."""
        size = len(self.prefix)
        return [path[size:] for path in self.place.files if path.startswith(self.prefix)]

    def __str__(self) -> str:
        return f"{self.prefix.rstrip('/')} in {self.place}" if self.prefix else str(self.place)


def looks_like_zero(files: Mapping[str, int]) -> bool:
    """Tell whether a directory, or its folder of a tag, holds optimizer states of ZeRO."""
    return any(_OPTIM.fullmatch(path.rpartition("/")[2]) and path.count("/") <= 1 for path in files)


def find_folder(place: Place, pointer: str) -> Folder:
    """Return the folder that a directory's `latest` names, or the directory itself.

    Raises Incomplete if what it names is not there, Unsupported if there are several and nothing says which.
    """
    if pointer in place.files:
        tag = _tag(place, pointer)
        if not any(path.startswith(f"{tag}/") for path in place.files):
            raise Incomplete(f"{pointer} in {place} names {ascii(tag)[:80]}, and there is no such folder")
        return Folder(place, f"{tag}/")
    tags = sorted({path.split("/")[0] for path in place.files if "/" in path and path.endswith("_states.pt")})
    if any(path.endswith("_states.pt") for path in place.files if "/" not in path) or not tags:
        return Folder(place, "")
    if len(tags) > 1:
        raise Unsupported(f"{place} holds {tags[:5]} and no file `{pointer}`: give the path of one of them")
    return Folder(place, f"{tags[0]}/")


def is_left_behind(place: Place, pointer: str) -> bool:
    """Tell whether a pointer names an earlier step than `latest` does, whose files of ZeRO are there.

    Tags that say no step tell nothing.
    """
    if not {pointer, _LATEST} <= place.files.keys():
        return False
    tags = _tag(place, pointer), _tag(place, _LATEST)
    old, new = (_STEP.fullmatch(tag) for tag in tags)
    is_there = looks_like_zero({path: 0 for path in place.files if path.startswith(f"{tags[1]}/")})
    return is_there and old is not None and new is not None and int(old[1]) < int(new[1])


def _tag(place: Place, pointer: str) -> str:
    said = place.read(pointer, 0, min(_MAX_TAG_BYTES, place.files[pointer]))
    return said.decode("utf-8", "replace").strip()


def optimizer_files(folder: Folder) -> list[RankFile]:
    """Return the optimizer states of every rank, in order. Raises Incomplete, Corrupt."""
    return _grid(folder, _numbered(folder, _OPTIM), "optim_states")


def model_files(folder: Folder, model: int) -> list[RankFile]:
    """Return the model states of one model-parallel rank: one file, or with ZeRO-3 one of each data rank."""
    strange = [name for name in folder.names if _OTHERS.fullmatch(name)]
    if strange:
        raise Unsupported(
            f"{strange[0]} in {folder} belongs to a pipeline or to experts of DeepSpeed, which are not read: "
            "convert it with DeepSpeed's ds_to_universal, and read that"
        )
    found = [name for name in folder.names if _is_of(_MODEL.fullmatch(name), model)]
    whole = {(data, model): name for data, name in enumerate(found)}
    parts = {key: name for key, name in _numbered(folder, _MODEL_3).items() if key[1] == model}
    if not whole and not parts:
        raise Incomplete(f"{folder} has no mp_rank_{model:02}_model_states.pt")
    return _grid(folder, whole or parts, "model_states")


def check_cut(folder: Folder, models: Sequence[int], num_said: int | None) -> None:
    """See that the files of all model-parallel ranks are there. Raises Incomplete."""
    expected = range(max(models) + 1 if num_said is None else num_said)
    if [*models] != [*expected]:
        raise Incomplete(
            f"{folder} has optimizer states of the model-parallel ranks {[*models]}, and its model was cut "
            f"among {len(expected)}: some are missing, or left from another world"
        )


def engine_tree(file: RankFile) -> Mapping[str, Any]:
    """Return what an engine keeps in a file of model states. Raises Corrupt."""
    tree = file.archive.tree
    if not isinstance(tree, dict):
        raise Corrupt(f"{file.path} is no file of a model's states")
    return tree


def with_ties(files: Sequence[RankFile], first: Mapping[str, Any]) -> list[RankFile]:
    """Let model states say which weights are tied, as those of the first rank do: ZeRO-3 tells no other."""
    tree = engine_tree(files[0])
    ties = tree.get("shared_params") or first.get("shared_params")
    told = replace(files[0].archive, tree={**tree, "shared_params": ties})
    return [replace(files[0], archive=told), *files[1:]]


def check_names(folder: Folder, files: Iterable[RankFile]) -> None:
    """See that files were saved under their names, as far as they say.

    torch.save puts what it writes into a folder of the file's own name, within the file. Raises Corrupt
    naming a file that was another rank's.
    """
    for file in files:
        own, first = file.path.removeprefix(folder.prefix), f"{_root_of(folder.place, file.path)}.pt"
        if _rank_of(first) not in (None, _rank_of(own)):
            raise Corrupt(
                f"{own} in {folder} was saved as {first}: files of ranks lie under each other's names, or "
                "one is a copy of another's"
            )


def _rank_of(name: str) -> tuple[str, int, int] | None:
    """Return of which kind of file, data-parallel and model-parallel rank a name is."""
    for pattern in (_OPTIM, _MODEL_3):
        found = pattern.fullmatch(name)
        if found:
            return pattern.pattern, int(found[1]), int(found[2])
    found = _MODEL.fullmatch(name)
    return (_MODEL.pattern, 0, int(found[1])) if found else None


def _root_of(place: Place, path: str) -> str:
    """Return the folder within a zip of torch.save; no text for other files."""
    head = place.read(path, 0, min(_ZIP_HEADER_BYTES + _MAX_NAME_BYTES, place.files[path]))
    if not head.startswith(_ZIP):
        return ""
    num_bytes = int.from_bytes(head[26:28], "little")
    name = head[_ZIP_HEADER_BYTES : _ZIP_HEADER_BYTES + num_bytes]
    return name.decode("utf-8", "replace").rpartition("/")[0]


def _is_of(found: re.Match[str] | None, model: int) -> bool:
    return found is not None and int(found[1]) == model


def _numbered(folder: Folder, pattern: re.Pattern[str]) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    for name in folder.names:
        match = pattern.fullmatch(name)
        if match:
            key = (int(match[1]), int(match[2]))
            if key in found:
                raise Corrupt(
                    f"{folder} has {found[key]} and {name}, both of one rank: one is of another save"
                )
            found[key] = name
    return found


def _grid(folder: Folder, names: Mapping[tuple[int, int], str], kind: str) -> list[RankFile]:
    """Read the files of all ranks, seeing that none is missing."""
    models = sorted({model for _, model in names})
    world = max((data for data, _ in names), default=-1) + 1
    for model in models:
        missing = [data for data in range(world) if (data, model) not in names and (model or len(names) > 1)]
        if missing:
            raise Incomplete(f"{folder} has no {kind} of rank {missing[0]}, model-parallel rank {model}")
    return [
        RankFile(path, data, model, read_archive(folder.place, path))
        for (data, model), name in sorted(names.items(), key=lambda item: (item[0][1], item[0][0]))
        for path in [folder.prefix + name]
    ]
