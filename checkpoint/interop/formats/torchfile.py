"""Files of torch.save as foreign checkpoints: a state_dict, or a model and an optimizer in one file."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Archive, Stored, is_archive, read_archive
from checkpoint.interop.formats.containers import CONTAINERS
from checkpoint.interop.formats.contract import About, is_weight
from checkpoint.interop.formats.hf_beside import read_beside
from checkpoint.interop.formats.hf_config import rules_for, sizes_from
from checkpoint.interop.formats.numbered import listed
from checkpoint.interop.formats.optimizer_dicts import Keys
from checkpoint.interop.formats.states import States, name_states
from checkpoint.interop.formats.tiles import Tile, Tiled, held
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
_MODEL = "pytorch_model.bin"  # of Hugging Face, beside which its Trainer puts others
_INDEX = f"{_MODEL}.index.json"


def looks_like_torch(files: Mapping[str, int]) -> bool:
    """Tell whether a directory holds a file of torch.save that is meant, or shards with an index."""
    return _INDEX in files or _MODEL in files or len(_candidates(files)) == 1


def open_torch(place: Place) -> Tiled:
    """Open a file of torch.save (or the shards of a Hugging Face `pytorch_model.bin`). Executes nothing.

    Raises Unsupported for what cannot be read without executing it, or where it cannot be told whose an
    optimizer's states are; Corrupt, Incomplete.
    """
    if _INDEX in place.files:
        return _open_shards(place)
    path = _the_file(place)
    archive = read_archive(place, path)
    states = name_states(archive.tree, Stored, place.spell(path))
    if path == _MODEL and place.spell(path) != place.url:
        _take_along(place, states, [path])
    return _opened(place, states, dict.fromkeys(states.tensors, archive))


def _open_shards(place: Place) -> Tiled:
    try:
        weight_map = json.loads(place.read(_INDEX))["weight_map"]
        paths = sorted(set(weight_map.values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{_INDEX} in {place} is no index: {error}") from error
    states, owners = States(), dict[str, Archive]()
    for path in paths:
        if path not in place.files:
            raise Incomplete(f"{_INDEX} in {place} names {ascii(path)[:80]}, which is not there")
        archive = read_archive(place, path)
        shard = name_states(archive.tree, Stored, place.spell(path))
        wrong = [name for name in shard.tensors if weight_map.get(name) != path or name in owners]
        if wrong:
            raise Corrupt(f"{place.spell(path)} holds {wrong[:3]}, of which the index says otherwise")
        states.tensors |= shard.tensors
        owners |= dict.fromkeys(shard.tensors, archive)
    missing = sorted(weight_map.keys() - owners.keys())
    if missing:
        raise Incomplete(f"the shards of {place} lack {missing[:5]}, which the index names")
    _take_along(place, states, paths)
    return _opened(place, states, owners)


def _opened(place: Place, states: States, owners: Mapping[str, Archive]) -> Tiled:
    tensors, tiles = [], []
    for name, item in states.tensors.items():
        tensor, parts = _tensor(name, item, owners[name])
        tensors.append(tensor)
        tiles.append(parts)
    if states.keys in (Keys.NAMES, Keys.FLAT):
        states.extra[CONTAINERS]["torch_keys"] = states.keys.value
    config = states.extra["config"] if "files" in states.extra else {}
    about = About(
        "torch",
        step=states.step,
        extra=states.extra,
        notes=tuple(states.notes),
        ties=_ties(states, owners),
        sizes=sizes_from(config),
        rules=rules_for(config),
        doubts=tuple(states.doubts),
        untold=states.untold,
    )
    return Tiled(place, about, tensors, tiles)


def _ties(states: States, owners: Mapping[str, Archive]) -> dict[str, str]:
    """Return the names of the model that are other names of the same memory, as tied weights are saved."""
    firsts: dict[Any, str] = {}
    ties = {}
    for name, item in states.tensors.items():
        if isinstance(item, Stored) and 0 not in item.shape and is_weight(name):
            first = firsts.setdefault((id(owners[name]), item), name)
            if first != name:
                ties[name] = first
    return ties


def _tensor(name: str, item: Any, archive: Archive) -> tuple[Foreign, list[Tile]]:
    if not isinstance(item, Stored):
        return held(name, item)
    return Foreign(name, item.dtype, item.shape), [Tile(Box.whole(item.shape), lambda: archive.locate(item))]


def _take_along(place: Place, states: States, read: Collection[str]) -> None:
    """Take in what lies beside a Hugging Face model, and note what is not looked at."""
    states.extra |= read_beside(place)
    others = sorted(set(_candidates(place.files)) - {*read})
    states.notes += [f"beside {_MODEL} are not looked at: {listed(others)}"] if others else []


def _the_file(place: Place) -> str:
    files = place.files
    found = list(files) if len(files) == 1 else [_MODEL] if _MODEL in files else _candidates(files)
    if len(found) != 1:
        raise Unsupported(
            f"{place} holds {len(found)} files that torch.save may have written, {sorted(found)[:5]}: "
            "give the path of one"
        )
    if not is_archive(place, found[0]):
        raise Corrupt(f"{place.spell(found[0])} is neither a zip nor an older file of torch.save")
    return found[0]


def _candidates(files: Mapping[str, int]) -> list[str]:
    return [name for name in files if name.endswith(_SUFFIXES) and "/" not in name]
