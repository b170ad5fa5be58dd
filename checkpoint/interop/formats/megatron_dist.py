"""Megatron-Core's distributed checkpoints (`torch_dist`): torch's own, with keys of Megatron's.

Tensors are shown by the names, and in the shapes, that a world of one rank has them in: each layer and each
expert by itself. So the same rule documents (`*-megatron`) read them and the legacy files of many ranks.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Archive, read_archive
from checkpoint.interop.formats.contract import About, Array
from checkpoint.interop.formats.dcp_files import Files
from checkpoint.interop.formats.dcp_metadata import METADATA, Chunked, Directory, read_directory
from checkpoint.interop.formats.deepspeed_steps import read_step
from checkpoint.interop.formats.inert import plain
from checkpoint.interop.formats.masters import check_masters
from checkpoint.interop.formats.megatron_arguments import arguments_of, sizes_of
from checkpoint.interop.formats.megatron_dist_buckets import Buckets, is_bucket
from checkpoint.interop.formats.megatron_dist_ranks import Ranks
from checkpoint.interop.formats.megatron_dist_table import Table
from checkpoint.interop.formats.megatron_files import AXES, tracked_folder
from checkpoint.interop.formats.megatron_groups import left_of_ranks, options_of
from checkpoint.interop.formats.tiles import Tile, Tiled, found
from checkpoint.interop.formats.told import HYPER
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

CONFIG, COMMON = "metadata.json", "common.pt"
BACKEND = "torch_dist"
EMBEDDING = "embedding.word_embeddings.weight"
_BUCKETS = "optimizer.distributed."
_GROUPS = re.compile(r"(?:chained_[0-9]+\.)?optimizer\.distributed\.dp_group_idx_[0-9]+\.optimizer/shard_0_1")
_MAX_RANKS = 1 << 16
_SKIPPED = {"args", "optimizer", "content_metadata", "rng_state", "rerun_state_machine"}
_MAX_CONFIG_BYTES = 1 << 20


def looks_like_megatron_dist(files: Mapping[str, int]) -> bool:
    """Tell whether a directory is a distributed checkpoint of Megatron-Core, or has iterations that are."""
    return bool(_folders(files))


def open_megatron_dist(place: Place) -> Tiled:
    """Open the iteration that a directory's tracker names, or the directory of one. Executes nothing.

    Raises Corrupt (masters that are not the weights' among them), Incomplete (a rank's file, or a layer, is
    missing), Unsupported (another backend).
    """
    folder = place.below(_folder(place))
    _check_backend(folder)
    common = read_archive(folder, COMMON)
    if not isinstance(common.tree, dict):
        raise Corrupt(f"{COMMON} in {folder} is no state of Megatron's")
    directory = read_directory(folder)
    files, table = Files(folder, directory), Table(str(folder))
    for key, one in directory.tensors.items():
        if _BUCKETS not in key:
            table.add(key, one, files)
    tensors, tiles = table.tensors()
    notes, groups = list(_notes(directory)), common.tree.get("optimizer")
    buckets = [key for key in directory.tensors if is_bucket(key)]
    if buckets:
        model = Tiled(folder, About(""), tuple(tensors), tuple(tiles))
        flats = [_flat_tensor(key, directory.tensors[key], files) for key in buckets]
        states, more = _in_buckets(model, tiles, flats, arguments_of(common.tree))
        tensors, tiles = tensors + [one for one, _ in states], tiles + [parts for _, parts in states]
        notes += more
        groups = [item for key, item in files.objects().items() if _GROUPS.fullmatch(key)]
    steps = list(_steps(folder, common, tensors, groups))
    opened = Tiled(
        folder,
        _about(folder, common.tree, tensors, (groups, notes)),
        [*tensors, *(tensor for tensor, _ in steps)],
        [*tiles, *(tile for _, tile in steps)],
    )
    check_masters(opened, str(folder))
    return opened


def _flat_tensor(key: str, one: Chunked, files: Files) -> tuple[Foreign, list[Tile]]:
    tiles = [files.tile(key, box, item, one.dtype) for box, item in one.chunks.items()]
    return Foreign(key, one.dtype, one.shape), tiles


def _in_buckets(
    model: Tiled,
    tiles: Sequence[Sequence[Tile]],
    flats: Sequence[tuple[Foreign, list[Tile]]],
    arguments: Mapping[str, Any],
) -> tuple[list[tuple[Foreign, list[Tile]]], list[str]]:
    """Return the states in buckets; or none, and a note, if they are of a kind that is not known."""
    flat_tiles = [parts for _, parts in flats]
    opened = Tiled(model.place, About(""), [one for one, _ in flats], flat_tiles)
    try:
        return list(Buckets(model, tiles, opened, flat_tiles).states(_ranks(arguments))), []
    except Unsupported as error:
        return [], [
            f"the distributed optimizer's states are left out, as of its buckets {error}. Save with "
            "--dist-ckpt-optim-fully-reshardable to have them"
        ]


def _ranks(arguments: Mapping[str, Any]) -> Ranks:
    """Return how many ranks the arguments speak of. Raises Unsupported."""
    tensors, stages, experts = (arguments.get(key, 1) for key in AXES.values())
    chunks = arguments.get("virtual_pipeline_model_parallel_size") or 1
    expert_tensors = arguments.get("expert_tensor_parallel_size") or tensors
    found = (tensors, stages, chunks, experts, expert_tensors)
    if any(type(count) is not int or not 1 <= count <= _MAX_RANKS for count in found):
        raise Unsupported(f"the arguments speak of {list(found)} ranks")
    return Ranks(*found)


def _folders(files: Mapping[str, int]) -> list[str]:
    """Return the folders that Megatron saved to; one whose save did not finish has no config."""
    above = [path.removesuffix(COMMON) for path in files if f"/{path}".endswith(f"/{COMMON}")]
    return sorted(path.rstrip("/") for path in above if path + CONFIG in files or path + METADATA in files)


def _folder(place: Place) -> str:
    named = tracked_folder(place)
    if named is not None:
        return named
    folders = _folders(place.files)
    if len(folders) < 2 or "" in folders:
        return folders[0] if folders else ""
    raise Unsupported(f"{place} holds {folders[:5]} and no tracker that says which: give the path of one")


def _check_backend(folder: Place) -> None:
    for name in (CONFIG, COMMON):
        if name not in folder.files:
            raise Incomplete(
                f"{folder} has no {name}: the save did not finish, or this is none of Megatron's"
            )
    try:
        config = json.loads(folder.read(CONFIG, 0, min(_MAX_CONFIG_BYTES, folder.files[CONFIG])))
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{CONFIG} in {folder} is no JSON: {error}") from error
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend != BACKEND:
        raise Unsupported(
            f"{folder} was saved by Megatron's backend {ascii(backend)[:80]}, and {BACKEND!r} is read: load "
            "it with Megatron, and save it with --ckpt-format torch_dist"
        )


def _steps(
    folder: Place, common: Archive, tensors: Sequence[Foreign], groups: Any
) -> Iterator[tuple[Foreign, list[Tile]]]:
    """Yield the step of each parameter that has moments: they share one, which the groups say."""
    prefix = "optimizer.exp_avg."
    owners = [tensor.name.removeprefix(prefix) for tensor in tensors if tensor.name.startswith(prefix)]
    if not owners:
        return
    said = [read_step(folder, common, value, COMMON) for value in _said_steps(groups)]
    said = said or [read_step(folder, common, common.tree.get("iteration"), COMMON)]
    (tensor, bits), *others = said
    if any(one.dtype != tensor.dtype or not _is_same(other, bits) for one, other in others):
        raise Corrupt(
            f"{COMMON} in {folder} has groups of parameters at different steps, which Megatron has not"
        )
    for owner in owners:
        yield Foreign(f"optimizer.step.{owner}", tensor.dtype, ()), [found(Box((), ()), bits)]


def _is_same(one: Array, other: Array) -> bool:
    return one.tobytes() == other.tobytes()


def _said_steps(node: Any) -> Iterator[Any]:
    """Yield the steps that an optimizer's state, or one of several, says."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("step", "common_step") if key in node)
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _said_steps(inner)


def _about(
    folder: Place, common: Mapping[str, Any], tensors: Sequence[Foreign], told: tuple[Any, Sequence[str]]
) -> About:
    where, arguments, step = str(folder), arguments_of(common), common.get("iteration")
    extra = {str(key): plain(value, where) for key, value in common.items() if key not in _SKIPPED}
    said, notes = told
    groups = options_of(said, where)
    extra |= {HYPER: groups} if groups else {}
    extra["args"] = {str(key): plain(value, where) for key, value in arguments.items()}
    sizes = sizes_of(arguments, {tensor.name for tensor in tensors})
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if len(shapes.get(EMBEDDING, ())) == 2:
        sizes["padded_vocab"] = shapes[EMBEDDING][0]  # the arguments say it for the run's tensor ranks
    return About(
        "megatron-dist",
        {},
        step if type(step) is int else None,
        extra,
        sizes,
        (*notes, *left_of_ranks(common)),
    )


def _notes(directory: Directory) -> Iterator[str]:
    keys = [*directory.tensors, *directory.objects]
    strange = [key for key in directory.tensors if _BUCKETS in key and not is_bucket(key)]
    chained = sorted({key.partition(_BUCKETS)[0] + _BUCKETS.rstrip(".") for key in strange})
    if chained:
        yield (
            f"the states of {', '.join(chained)} are left out: several distributed optimizers (experts have "
            "one of their own), or buffers, lie in buckets of each rank's own order. Save with "
            "--dist-ckpt-optim-fully-reshardable to have them"
        )
    objects = sorted({key.partition("/")[0] for key in keys if "/" in key and _BUCKETS not in key})
    if objects:
        yield f"objects of each rank's modules (FP8 scales, random states) are left out, as {objects[0]!r}"
