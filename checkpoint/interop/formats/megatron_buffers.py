"""The states of Megatron's distributed optimizer beside its legacy files: a `distrib_optim.pt` for each.

Masters and moments of a rank's parameters lie end to end in flat buffers: in the reverse of the model's
order, each begun at a multiple of 64 elements within its bucket. Neither the order nor where buckets end is
in a file. So each master is held against the weight that was rounded from it; moments lie as masters do.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.archive import Archive, Stored, read_archive
from checkpoint.interop.formats.extents import Extent, contiguous, read_box
from checkpoint.interop.formats.inert import Name
from checkpoint.interop.formats.masters import is_rounded
from checkpoint.interop.formats.megatron_files import FILE, ShardFile
from checkpoint.interop.formats.megatron_stages import chunk_of
from checkpoint.interop.formats.rounding import ROUNDED
from checkpoint.interop.formats.tiles import Tile
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

BUFFERS = "distrib_optim.pt"
_STATES = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ALIGNMENT = 64  # elements
_EXPERTS = ".experts."

Model = Mapping[str, Stored]
Parts = tuple[Foreign, list[Tile]]


@dataclass(frozen=True, slots=True)
class Rank:
    """A model rank: its file, the weights in it in the model's order, and its optimizers' buffers."""

    file: ShardFile
    model: Model
    buffers: Archive

    @property
    def optimizers(self) -> Sequence[Any]:
        """What its optimizers saved: one, or one of all but the experts and one of those."""
        tree = self.buffers.tree
        return tree if isinstance(tree, list) else [tree]

    @property
    def path(self) -> str:
        """The file of its buffers."""
        return _path(self.file)


def has_buffers(place: Place) -> bool:
    """Tell whether a distributed optimizer saved its states beside some rank's file."""
    return any(path.endswith(f"/{BUFFERS}") for path in place.files)


def read_rank(place: Place, file: ShardFile, model: Model) -> Rank:
    """Return a rank with its buffers. Raises Incomplete if they are not there."""
    path = _path(file)
    if path not in place.files:
        raise Incomplete(
            f"{path} is missing in {place}, and other ranks of the distributed optimizer have one"
        )
    return Rank(file, model, read_archive(place, path))


def states_of(place: Place, ranks: Sequence[Rank]) -> Iterator[Parts]:
    """Yield the masters and moments of every rank.

    Raises Corrupt naming a parameter whose master is not where it should be, Incomplete, Unsupported.
    """
    for rank in ranks:
        for number, saved in enumerate(rank.optimizers):
            holder = rank if saved is not None else _holder(ranks, rank, number)
            members = {
                name: stored
                for name, stored in rank.model.items()
                if len(rank.optimizers) == 1 or (_EXPERTS in name) == (number == 1)
            }
            for dtype, chunk, table in _tables(holder, number):
                mine = {
                    name: stored
                    for name, stored in members.items()
                    if stored.dtype == dtype and chunk_of(name) == chunk
                }
                for name, start in _places(place, rank, mine, (holder, table)):
                    yield from _of_parameter(rank, name, holder, (table, start))


def _holder(ranks: Sequence[Rank], rank: Rank, number: int) -> Rank:
    """Return who saved for a rank: experts' ranks have copies of the rest, and the first of them saves it."""
    for other in ranks:
        is_beside = all(
            other.file.at[axis] == rank.file.at[axis] for axis in rank.file.at if axis != "expert"
        )
        if is_beside and len(other.optimizers) > number and other.optimizers[number] is not None:
            return other
    raise Incomplete(f"{rank.path} leaves its states to another expert rank, and none has them")


def _tables(rank: Rank, number: int) -> Iterator[tuple[str, int, Mapping[str, Stored]]]:
    """Yield the flat tensors of each buffer, with the dtype and the virtual stage of its parameters."""
    saved = rank.optimizers[number]
    if not isinstance(saved, dict) or saved.get("buckets_coalesced") is not True or number > 1:
        raise Unsupported(
            f"{rank.path} has its buffers in an older layout, bucket by bucket: load it in Megatron with "
            "--ckpt-convert-update-legacy-dist-opt-format, and save it again"
        )
    seen: dict[str, int] = {}
    most = 1 + max(chunk_of(name) for name in rank.model)
    for buffers in (saved[key] for key in sorted(key for key in saved if type(key) is int)):
        for key, table in buffers.items() if isinstance(buffers, dict) else ():
            dtype = key[0].text if isinstance(key, tuple) and key and isinstance(key[0], Name) else ""
            if dtype not in ROUNDED or seen.get(dtype) == most:
                raise Unsupported(f"{rank.path} has buffers of {dtype!r} parameters, or several: not read")
            seen[dtype] = seen.get(dtype, 0) + 1  # each virtual stage has its own
            yield dtype, seen[dtype] - 1, _flat_tensors(rank, table)


def _flat_tensors(rank: Rank, table: Any) -> Mapping[str, Stored]:
    """Return a buffer's tensors, seen to be alike."""
    found = {
        key: one
        for key, one in (table.items() if isinstance(table, dict) else ())
        if key in _STATES.values() and isinstance(one, Stored) and one.dtype == "float32"
    }
    if len(found) != len(_STATES):
        raise Corrupt(f"{rank.path} has a buffer without the states {[*_STATES.values()]} of fp32")
    if len({one.shape for one in found.values()}) != 1 or any(one.strides != (1,) for one in found.values()):
        raise Corrupt(
            f"{rank.path} has a buffer of states of the shapes {[one.shape for one in found.values()]}"
        )
    return found


def _places(
    place: Place, rank: Rank, members: Model, where: tuple[Rank, Mapping[str, Stored]]
) -> Iterator[tuple[str, int]]:
    """Yield where each parameter begins in a buffer, told by the contents of the masters there."""
    holder, table = where
    (numel,) = table["param"].shape
    origin = reached = 0
    for name in reversed([*members]):
        stored = members[name]
        aligned = origin + -(-(reached - origin) // _ALIGNMENT) * _ALIGNMENT
        count = prod(stored.shape)
        for start in dict.fromkeys((aligned, reached)):  # in the same bucket, or the first of the next
            master = _run(holder, table["param"], start, stored.shape)
            weight = rank.file.archive.locate(stored)
            if start + count <= numel and is_rounded(
                partial(read_box, place, master), partial(read_box, place, weight), stored
            ):
                break
        else:
            raise Corrupt(
                f"{holder.path} does not hold the master of {name!r} at element {aligned}, from which the "
                f"weight in {rank.file.path} would have been rounded: the file is another rank's, of another "
                "step, or of a model with another order of parameters"
            )
        origin = origin if start == aligned else start
        reached = start + count
        yield name, start
    if reached != numel:
        raise Corrupt(f"{holder.path} has {numel} elements, and the parameters of {rank.file.path} {reached}")


def _of_parameter(
    rank: Rank, name: str, holder: Rank, where: tuple[Mapping[str, Stored], int]
) -> Iterator[Parts]:
    table, start = where
    shape = rank.model[name].shape
    for state, key in _STATES.items():
        tensor = Foreign(f"optimizer.{state}.{name}", "float32", shape, rank.file.at)
        yield tensor, [Tile(Box.whole(shape), partial(_run, holder, table[key], start, shape))]


def _run(holder: Rank, flat: Stored, start: int, shape: tuple[int, ...]) -> Extent:
    """Return elements of a flat tensor as a tensor of some shape."""
    extent = holder.buffers.locate(flat)
    offset = extent.offset + start * itemsize(extent.dtype)
    return Extent(extent.path, offset, extent.dtype, shape, contiguous(shape))


def _path(file: ShardFile) -> str:
    return file.path.removesuffix(FILE) + BUFFERS
