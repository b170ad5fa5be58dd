"""Megatron-LM's legacy checkpoints: each rank's part of the model and its optimizer, as the ranks had them.

Tensors keep Megatron's names and their places on the axes; the rule documents `*-megatron` say what they are.
Optimizers number their parameters, group after group: whose each state is follows from the model's order, and
is seen in the masters, which rounded are the weights. A distributed optimizer's are in `megatron_buffers`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from checkpoint.errors import Corrupt, Incomplete
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.inert import plain
from checkpoint.interop.formats.masters import check_masters
from checkpoint.interop.formats.megatron_arguments import arguments_of, sizes_of
from checkpoint.interop.formats.megatron_buffers import has_buffers, read_rank, states_of
from checkpoint.interop.formats.megatron_files import ShardFile, find_files, looks_like_megatron
from checkpoint.interop.formats.megatron_groups import left_of_optimizer, left_of_ranks, options_of
from checkpoint.interop.formats.megatron_stages import Stages, chunk_keys, of_chunk
from checkpoint.interop.formats.numbered import names_of_numbered
from checkpoint.interop.formats.tiles import Tile, Tiled, held
from checkpoint.interop.formats.told import HYPER
from checkpoint.interop.formats.twins import Samples, check_distinct
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

__all__ = ["looks_like_megatron", "open_megatron"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SKIPPED = ("optimizer", "args", "rng_state", "rerun_state_machine")


def open_megatron(place: Place) -> Tiled:
    """Open the iteration that a directory's tracker names, or the directory of one.

    Raises Incomplete, Corrupt or Unsupported naming a file that is missing or of another save, or an
    optimizer of which it cannot be told whose its states are.
    """
    axes, files = find_files(place)
    tensors: list[Foreign] = []
    tiles: list[list[Tile]] = []
    samples, ranks = [], []
    is_flat = has_buffers(place)
    chunks = [_chunks(file) for file in files]
    stages = _stages(files, chunks, str(place))
    for file, parts_of_model in zip(files, chunks, strict=True):
        model = {name: stored for chunk in parts_of_model for name, stored in chunk.items()}
        for name, stored in model.items():
            tensors.append(Foreign(name, stored.dtype, stored.shape, file.at))
            tiles.append([Tile(Box.whole(stored.shape), partial(file.archive.locate, stored))])
        for tensor, parts in _steps(file, model) if is_flat else _optimizer(file, model):
            tensors.append(tensor)
            tiles.append(parts)
        samples += [Samples(file.path, file.archive, list(chunk.values())) for chunk in parts_of_model]
        ranks += [read_rank(place, file, model)] if is_flat else []
    check_distinct(place, samples)
    for tensor, parts in states_of(place, ranks):
        tensors.append(tensor)
        tiles.append(parts)
    tensors = [stages.shown(tensor) for tensor in tensors] if stages else tensors
    opened = Tiled(place, _about(place, axes, files, tensors), tensors, tiles)
    if not is_flat:
        check_masters(opened, str(place))
    return opened


def _chunks(file: ShardFile) -> list[dict[str, Stored]]:
    """Return a rank's model: one, or of virtual pipeline stages each by itself, under names of their own."""
    keys = chunk_keys(file.tree, file.path)
    parts = [_flat(file.tree[key], file.path) for key in keys]
    if keys == ["model"]:
        return parts
    return [{of_chunk(number, name): one for name, one in part.items()} for number, part in enumerate(parts)]


def _stages(
    files: Sequence[ShardFile], chunks: Sequence[Sequence[Mapping[str, Stored]]], where: str
) -> Stages | None:
    """Return which layers each chunk has, if there are virtual stages. Raises Corrupt, Unsupported."""
    if all("model" in file.tree for file in files):
        return None
    for file, parts in zip(files, chunks, strict=True):
        if len(parts) != len(chunks[0]) or "model" in file.tree:
            raise Corrupt(
                f"{file.path} has {len(parts)} parts of the model, and {files[0].path} {len(chunks[0])}"
            )
    return Stages([[*map(set, parts)] for parts in _by_stage(files, chunks)], where)


def _by_stage(
    files: Sequence[ShardFile], chunks: Sequence[Sequence[Mapping[str, Stored]]]
) -> list[Sequence[Mapping[str, Stored]]]:
    """Return the chunks of one rank of each pipeline stage."""
    found = {file.at["pipeline"]: parts for file, parts in zip(files, chunks, strict=True)}
    return [found[stage] for stage in sorted(found)]


def _flat(node: Any, path: str) -> dict[str, Stored]:
    """Return the tensors of a model by name; older files nest them in dicts of modules."""
    found: dict[str, Stored] = {}
    pending: list[tuple[str, Any]] = [("", node)]
    while pending:
        prefix, each = pending.pop()
        if isinstance(each, Stored):
            if prefix in found:
                raise Corrupt(f"{path} holds {prefix!r} twice")
            if not prefix.endswith("_extra_state"):
                found[prefix] = each
        elif isinstance(each, dict):
            if prefix.count(".") > 60:
                raise Corrupt(f"{path} nests its model without end")
            inner = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in each.items()]
            pending += inner[::-1]
    if not found:
        raise Corrupt(f"{path} holds a model without tensors")
    return found


Parts = tuple[Foreign, list[Tile]]


def _optimizer(file: ShardFile, model: Mapping[str, Stored]) -> Iterator[Parts]:
    """Yield a rank's optimizer states; experts that are spread over ranks have an optimizer of their own."""
    said = file.tree.get("optimizer")
    chained = said if isinstance(said, list) else [said]
    for number, one in enumerate(chained):
        if isinstance(one, dict):
            mine = {
                name: stored
                for name, stored in model.items()
                if len(chained) == 1 or (".experts." in name) == (number == 1)
            }
            yield from _states(file, one, mine)


def _steps(file: ShardFile, model: Mapping[str, Stored]) -> Iterator[Parts]:
    """Yield the steps of a distributed optimizer, which its groups say: its states are in other files."""
    said = file.tree.get("optimizer")
    groups = [
        group
        for one in (said if isinstance(said, list) else [said])
        if isinstance(one, dict) and isinstance(one.get("optimizer"), dict)
        for group in one["optimizer"].get("param_groups") or ()
        if isinstance(group, dict)
    ]
    steps = {group["step"] for group in groups if type(group.get("step")) in (int, float)}
    if len(steps) > 1:
        raise Corrupt(f"{file.path} has groups of parameters at the steps {sorted(steps)}")
    for name in model:
        yield _step(file, name, next(iter(steps), None))


def _states(file: ShardFile, said: Mapping[str, Any], model: Mapping[str, Stored]) -> Iterator[Parts]:
    inner = said.get("optimizer", said)
    if not isinstance(inner, dict) or not isinstance(inner.get("param_groups"), list):
        raise Corrupt(f"{file.path} holds an optimizer without groups of parameters")
    groups = [group for group in inner["param_groups"] if isinstance(group, dict) and group.get("params")]
    table = inner.get("state")
    if not isinstance(table, dict) or not table:
        return
    names = names_of_numbered(table, groups, model, Stored, file.path).names
    masters = _masters(file, said, groups)
    for group in groups:
        for number in group["params"]:
            name, states = names[number], table.get(number)
            if not isinstance(states, dict) or any(moment not in states for moment in _MOMENTS):
                raise Incomplete(f"{file.path} lacks the moments of {name!r}: is its optimizer Adam?")
            there = {moment: states[moment] for moment in _MOMENTS}
            if number in masters:
                there["master"] = masters[number]
            for state, stored in there.items():
                yield _state(file, f"optimizer.{state}.{name}", stored, model[name])
            yield _step(file, name, states.get("step", group.get("step")))


def _masters(file: ShardFile, said: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """Return the fp32 parameters by their number: a list for every group, in the group's order."""
    lists = said.get("fp32_from_fp16_params")
    if lists is None:
        return {}
    there = [each for each in lists if each] if isinstance(lists, list) else []
    found: dict[int, Any] = {}
    for group, masters in zip(groups, there, strict=False):
        if not isinstance(masters, list) or len(masters) != len(group["params"]):
            raise Corrupt(f"{file.path} has other fp32 parameters than its optimizer has groups")
        found |= dict(zip(group["params"], masters, strict=True))
    if len(there) != len(groups):
        raise Corrupt(f"{file.path} has fp32 parameters of {len(there)} groups, and {len(groups)} groups")
    return found


def _state(file: ShardFile, name: str, stored: Any, weight: Stored) -> Parts:
    if not isinstance(stored, Stored) or stored.shape != weight.shape:
        raise Corrupt(f"{file.path}: {name!r} is not of the shape {weight.shape} of its parameter")
    tensor = Foreign(name, stored.dtype, stored.shape, file.at)
    return tensor, [Tile(Box.whole(stored.shape), partial(file.archive.locate, stored))]


def _step(file: ShardFile, name: str, step: Any) -> Parts:
    if isinstance(step, Stored) and step.shape in ((), (1,)):
        scalar = Stored(step.storage, step.offset, step.dtype, (), ())
        tensor = Foreign(f"optimizer.step.{name}", step.dtype, (), file.at)
        return tensor, [Tile(Box((), ()), partial(file.archive.locate, scalar))]
    if type(step) not in (int, float):
        step = file.tree.get("iteration")
    if type(step) not in (int, float):
        raise Corrupt(f"{file.path} does not say which step its optimizer has done")
    tensor, tiles = held(f"optimizer.step.{name}", step)
    return Foreign(tensor.name, tensor.dtype, (), file.at), tiles


# ------------------------------------------------------------------------------------------- what it says


def _about(
    place: Place, axes: Mapping[str, int], files: Sequence[ShardFile], tensors: Sequence[Foreign]
) -> About:
    tree, where = files[0].tree, str(place)
    arguments = arguments_of(tree)
    step = tree.get("iteration")
    skipped = {*_SKIPPED, *chunk_keys(tree, files[0].path)}
    extra = {str(key): plain(value, where) for key, value in tree.items() if key not in skipped}
    extra["args"] = {str(key): plain(value, where) for key, value in arguments.items()}
    groups = options_of([file.tree.get("optimizer") for file in files], where)
    extra |= {HYPER: groups} if groups else {}
    notes = [*left_of_ranks(tree), *left_of_optimizer(tree.get("optimizer"))]
    return About(
        "megatron",
        axes,
        step if type(step) is int else None,
        extra,
        sizes_of(arguments, {tensor.name for tensor in tensors}),
        tuple(notes),
    )
