"""Hugging Face models: safetensors, one file or sharded with an index, and the configuration beside them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import About, Contents, is_weight, weight_name
from checkpoint.interop.formats.extents import check_shape
from checkpoint.interop.formats.hf_beside import read_beside, stem_of, write_beside
from checkpoint.interop.formats.hf_config import rules_for, sizes_from, ties_from
from checkpoint.interop.formats.hf_files import SUFFIX, find_weights, parsed
from checkpoint.interop.formats.safetensors import Header, header_bytes, read_header, sort_key
from checkpoint.interop.formats.streams import blocks_ahead, check_global, num_bytes_of
from checkpoint.interop.formats.tiles import Tile, Tiled, found
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

MAX_SHARD_BYTES = 5_000_000_000

_SHARDING = "DCP_SHARDING_INFO"  # what torch's distributed checkpoints add when they write this format
_OF_RANKS = (
    "shapes are inferred from the parts that ranks wrote, which do not tell how many there were: a missing "
    "last rank looks like a smaller tensor",
)


def looks_like_hf(files: Mapping[str, int]) -> bool:
    """Tell whether a directory holds safetensors files."""
    return any(name.endswith(SUFFIX) for name in files)


def open_hf(place: Place) -> Tiled:
    """Open a Hugging Face model; what lies beside its weights is carried along as `config` and `files`.

    Raises Corrupt for a file that is not what its header says, Incomplete if a shard is missing, Unsupported
    if files lie beside each other of which it cannot be told which are meant.
    """
    weights = find_weights(place)
    headers = {path: read_header(place, path) for path in weights.paths}
    if weights.weight_map is not None:
        _check_index(place, weights.weight_map, headers)
    tensors, tiles = _gather(place, headers)
    extra = read_beside(place)
    config = extra["config"]
    is_parted = any(_SHARDING in header.metadata for header in headers.values())
    about = About(
        "hf",
        extra=extra,
        sizes=sizes_from(config),
        rules=rules_for(config),
        notes=weights.notes + (_OF_RANKS if is_parted else ()),
        ties=ties_from(config, {one.name for one in tensors}),
    )
    return Tiled(place, about, tensors, tiles)


def write_hf(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a model in shards of at most 5 GB (or `max_shard_bytes`), an index, and what goes with them.

    Raises Unsupported for what a model's files cannot hold: optimizer states, other tensors, some dtypes.
    """
    check_global(contents.tensors, "hf")
    for tensor in contents.tensors:
        if not is_weight(tensor.name):
            raise Unsupported(f"{tensor} is no part of a model: the format hf does not hold it, leave it out")
    extra = contents.about.extra
    write_beside(draft, extra)
    stem = stem_of(extra)
    chosen = extra.get("max_shard_bytes")
    max_bytes = chosen if type(chosen) is int and chosen > 0 else MAX_SHARD_BYTES
    shards = _dealt(contents.tensors, max_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        part = f"-{number + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = f"{stem}{part}{SUFFIX}"
        weight_map |= {contents.tensors[each].name: path for each in shard}
        if path not in draft.kept:
            _write_shard(draft, path, contents, shard, budget_bytes)
    if len(shards) > 1:
        total = sum(num_bytes_of(tensor) for tensor in contents.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with draft.writing(f"{stem}{SUFFIX}.index.json") as file:
            file.write(json.dumps(index, indent=2).encode())


def _write_shard(
    draft: Draft, path: str, contents: Contents, shard: Sequence[int], budget_bytes: int
) -> None:
    order = sorted(shard, key=lambda number: sort_key(contents.tensors[number]))
    with draft.writing(path) as file:
        file.write(header_bytes([contents.tensors[number] for number in order], {"format": "pt"}))
        for block in blocks_ahead(contents, order, budget_bytes, draft.num_threads):
            file.write(block)


def _dealt(tensors: Sequence[Foreign], max_bytes: int) -> list[list[int]]:
    """Deal tensors to shards in their order; one that is too large gets a shard of its own."""
    shards: list[list[int]] = [[]]
    filled = 0
    for number, tensor in enumerate(tensors):
        if shards[-1] and filled + num_bytes_of(tensor) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(number)
        filled += num_bytes_of(tensor)
    return shards


def _check_index(place: Place, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    for name, path in weight_map.items():
        if name not in headers[path].tensors:
            raise Incomplete(f"the index of {place} says that {name!r} lies in {path}, which lacks it")
    for path, header in headers.items():
        strays = [name for name in header.tensors if weight_map.get(name) != path]
        if strays:
            raise Corrupt(f"{path} in {place} holds {strays[:3]}, of which the index says otherwise")


def _gather(place: Place, headers: Mapping[str, Header]) -> tuple[list[Foreign], list[list[Tile]]]:
    """Return every tensor and the tiles that hold it: one, unless torch has written the parts of ranks."""
    tensors: dict[str, Foreign] = {}
    tiles: dict[str, list[Tile]] = {}
    for path, header in headers.items():
        sharding = _json_text(header.metadata.get(_SHARDING), path)
        for name, extent in header.tensors.items():
            start = _offsets(sharding, name, path) if sharding else (0,) * len(extent.shape)
            box = Box(start, extent.shape) if len(start) == len(extent.shape) else None
            known = tensors.get(name)
            if box is None or (known and (known.dtype, len(known.shape)) != (extent.dtype, len(box.size))):
                raise Corrupt(f"{name!r} in {path} of {place} does not go with its other parts")
            if known and not sharding:
                raise Corrupt(f"{name!r} is in several files of {place}, {path} among them")
            shape = tuple(map(max, known.shape, box.stop)) if known else box.stop
            tensors[name] = Foreign(weight_name(name, place.spell(path)), extent.dtype, shape)
            tiles.setdefault(name, []).append(found(box, extent))
    return list(tensors.values()), list(tiles.values())


def _offsets(sharding: Mapping[str, Any], name: str, path: str) -> tuple[int, ...]:
    entry = sharding.get(name)
    if not isinstance(entry, dict):
        raise Corrupt(f"{path} does not say which part of {name!r} it holds")
    return check_shape(entry.get("saved_offsets"), f"{name!r} of {path}")


def _json_text(text: str | None, path: str) -> dict[str, Any]:
    """Read JSON within a file's metadata; without any it is empty."""
    return parsed(text.encode(), f"the metadata of {path}") if text is not None else {}
