"""Checkpoints of torch.distributed.checkpoint (DCP): of any number of ranks, whatever sharded the state."""

from collections.abc import Mapping
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.interop.formats.containers import CONTAINERS
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.dcp_files import Files, Leaf
from checkpoint.interop.formats.dcp_metadata import Key, metadata_files, read_directory
from checkpoint.interop.formats.states import name_states
from checkpoint.interop.formats.tiles import Tiled, held
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place


def looks_like_dcp(files: Mapping[str, int]) -> bool:
    """Tell whether a directory holds a checkpoint of torch.distributed.checkpoint, and not Megatron's."""
    return bool(metadata_files(files)) and not {"metadata.json", "common.pt"} & files.keys()


def open_dcp(place: Place) -> Tiled:
    """Open a checkpoint of torch.distributed.checkpoint, model and optimizer. Executes nothing.

    Raises Corrupt, Incomplete (a rank's file is missing), Unsupported (compressed).
    """
    directory = read_directory(place)
    files = Files(place, directory)
    leaves: dict[str, Any] = files.objects()
    for name, one in directory.tensors.items():
        tiles = [files.tile(name, box, item, one.dtype) for box, item in one.chunks.items()]
        leaves[name] = Leaf(one.dtype, one.shape, tiles)
    states = name_states(_nested(leaves, directory.keys, str(place)), Leaf, str(place))
    if states.keys is not None:
        states.extra[CONTAINERS]["dcp_keys"] = states.keys.value
    tensors, tiles_of = [], []
    for name, leaf in states.tensors.items():
        if isinstance(leaf, Leaf):
            tensors.append(Foreign(name, leaf.dtype, leaf.shape))
            tiles_of.append(leaf.tiles)
        else:
            tensor, parts = held(name, leaf)
            tensors.append(tensor)
            tiles_of.append(parts)
    about = About(
        "dcp",
        step=states.step,
        extra=states.extra,
        notes=tuple(states.notes),
        doubts=tuple(states.doubts),
        untold=states.untold,
    )
    return Tiled(place, about, tensors, tiles_of)


def _nested(leaves: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> Any:
    """Nest what was saved under flat names, as the planner says that it was."""
    root: dict[Any, Any] = {}
    for name, leaf in leaves.items():
        *above, last = keys.get(name, (name,))
        node = root
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise Corrupt(f"{where} has {name!r} within something that is no container")
        if last in node:
            raise Corrupt(f"{where} has two things at {keys.get(name, name)}")
        node[last] = leaf
    return _with_lists(root)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    items = {key: _with_lists(item) for key, item in node.items()}
    if items and all(type(key) is int for key in items):
        return [items[key] for key in sorted(items)]
    return items
