"""Which files of a Hugging Face folder hold its model: those that its index names, or one set of shards."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, NotFound, Unsupported
from checkpoint.interop.place import Place

SUFFIX = ".safetensors"

_INDEX_SUFFIX = f"{SUFFIX}.index.json"
_SINGLE = f"model{SUFFIX}"  # what transformers takes first, whatever index lies beside it
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)\.safetensors")
_RANK = re.compile(r"^shard-\d{5}-(?=model-)")  # how torch begins the names of the parts that a rank writes
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that hold a model, which of them each tensor lies in (if an index says it), and notes."""

    paths: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    notes: tuple[str, ...]


def find_weights(place: Place) -> Weights:
    """Return the files that hold the model.

    Raises Incomplete if one is missing, Unsupported if there are others of which it cannot be told whether
    they belong to it, Corrupt for an index that is none, NotFound for a link that leads nowhere.
    """
    found = [path for path in place.files if path.endswith(SUFFIX)]
    indices = [name for name in place.files if name.endswith(_INDEX_SUFFIX) and "/" not in name]
    if len(indices) > 1:
        raise Corrupt(f"{place} has several indices, {indices}: which one is meant?")
    weight_map = _weight_map(place, indices[0]) if indices else None
    if weight_map is None:
        paths, notes = _without_index(place, [path for path in found if "/" not in path])
    else:
        paths, notes = sorted(set(weight_map.values())), list[str]()
    for path in paths:
        _check_leads_somewhere(place, path)
    others = [path for path in found if path not in paths]
    if others:
        notes.append(f"other safetensors files are not looked at: {_listed(others)}")
    return Weights(tuple(paths), weight_map, tuple(notes))


def parsed(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises Corrupt if it holds none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{where} is no sound JSON: {error}") from error
    if not isinstance(found, dict):
        raise Corrupt(f"{where} is not a JSON object")
    return found


def _weight_map(place: Place, index: str) -> dict[str, str]:
    weight_map = parsed(place.read(index), f"{index} in {place}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Corrupt(f"{index} in {place} has no weight_map")
    for name, path in weight_map.items():
        if not isinstance(path, str) or "/" in path or "\\" in path or path in ("", ".", ".."):
            raise Corrupt(f"{index} in {place} says that {name!r} lies in {ascii(path)[:80]}, outside of it")
    _check_no_rival(place, index, set(weight_map.values()))
    for name, path in weight_map.items():
        if path not in place.files:
            raise Incomplete(f"{index} in {place} says that {name!r} lies in {path}, which is not there")
    return weight_map


def _check_no_rival(place: Place, index: str, named: set[str]) -> None:
    """See that no whole model lies beside an index: others take that one first, and it may differ."""
    for single in (_SINGLE, index.removesuffix(".index.json")):
        if single in place.files and single not in named:
            raise Unsupported(
                f"{place} holds {single} and {index}, which does not name it: which one is meant? Give the "
                f"path of {single}, or remove it, or remove the index and its shards"
            )


def _without_index(place: Place, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return one file, or the shards of one set, and notes."""
    if not paths:
        raise Incomplete(f"{place} holds no safetensors file; it holds {sorted(place.files)[:_SHOWN]}")
    sets: dict[tuple[str, str, str], list[str]] = {}
    for path in paths:
        sets.setdefault(_set_of(path), []).append(path)
    if len(sets) > 1:
        raise Unsupported(
            f"{place} has no index, and safetensors files of more than one model or save: "
            f"{_listed(map(_spelled, sets.values()))}. Which one is meant? Give the path of one file, remove "
            "the others, or restore the index that says which belong together"
        )
    ((_, expected, _),) = sets
    numbers = {match[2] for path in paths if (match := _NUMBERED.fullmatch(path))}
    if not numbers or {int(number) for number in numbers} == set(range(1, int(expected) + 1)):
        return [*paths], []
    if place.spell(paths[0]) == place.url:
        return [*paths], [f"{paths[0]} is one of {int(expected)} shards: what the others hold is left out"]
    raise Incomplete(
        f"{place} has {len(numbers)} of {int(expected)} shards, and no index: {_listed(paths)}. "
        "Get the missing ones"
    )


def _set_of(path: str) -> tuple[str, str, str]:
    """Return what the names of one save's shards have in common, or a lone file's own name."""
    match = _NUMBERED.fullmatch(path)
    return (_RANK.sub("shard-*-", match[1] + "-"), match[3], match[4]) if match else (path, "0", "")


def _spelled(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more of its set)"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{', '.join(every[:_SHOWN])}{more}"


def _check_leads_somewhere(place: Place, path: str) -> None:
    """See that an empty file is none because it is a link to what was removed."""
    local = place.local(path) if not place.files[path] else None
    if local is not None and local.is_symlink() and not local.exists():
        raise NotFound(
            f"{place.spell(path)} is a link that leads nowhere: what it points to was moved or removed. "
            "Get it again, or give the folder that holds it"
        )
