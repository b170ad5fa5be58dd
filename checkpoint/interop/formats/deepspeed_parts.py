"""Where ZeRO's flat partitions hold each parameter: fragments of every rank, end to end in rank order.

ZeRO-1 and 2 lay a group's parameters end to end, each rank has an equal run, and the padding of the last one
is not saved; each file says what it holds (`param_slice_mappings`), or the order and sizes say it. ZeRO-3
divides every parameter on its own: rank r has elements r * p, ..., (r + 1) * p - 1, where p is the size
divided by the ranks, rounded up, and what goes beyond the size is padding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from checkpoint.errors import Corrupt, Incomplete
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.deepspeed_files import RankFile
from checkpoint.interop.formats.deepspeed_state import run_of
from checkpoint.interop.formats.extents import check_shape, read_box
from checkpoint.interop.formats.inert import Record
from checkpoint.interop.place import Place

Shape = tuple[int, ...]
FLAT = "single_partition_of_fp32_groups"
FLAT_3 = "fp32_flat_groups"
_MAX_PADDINGS = 64  # of each rank's file, evenly among all: each takes a request
_MAX_PADDING = 1024  # elements of each


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements first, ..., first + numel - 1 of a parameter, at `start` of a rank's partition of a group."""

    file: int  # its number among the ranks' files
    group: int
    start: int
    first: int
    numel: int


def zero_of(file: RankFile) -> Mapping[str, Any]:
    """Return what ZeRO keeps in a rank's file of optimizer states. Raises Corrupt."""
    tree = file.archive.tree
    zero = tree.get("optimizer_state_dict") if isinstance(tree, dict) else None
    if not isinstance(zero, dict) or not zero.keys() & {"zero_stage", FLAT, FLAT_3}:
        raise Corrupt(f"{file.path} is no file of ZeRO's optimizer states")
    return zero


def stage_of(zero: Mapping[str, Any]) -> int:
    """Return which stage of ZeRO a file is of."""
    stage = zero.get("zero_stage", 1)
    if isinstance(stage, Record):
        made_of = getattr(stage, "made_of", ())
        stage = made_of[0] if made_of else None
    return stage if type(stage) is int else 1


def group_shapes(file: RankFile) -> list[dict[str, Shape]]:
    """Return the shapes of the parameters of every group, in order, as a file of model states lists them."""
    groups = file.archive.tree.get("param_shapes") if isinstance(file.archive.tree, dict) else None
    if isinstance(groups, dict):
        groups = [groups]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise Corrupt(f"{file.path} does not say what shapes the parameters have")
    return [
        {str(name): check_shape(shape, f"{name} of {file.path}") for name, shape in group.items()}
        for group in groups
    ]


def fragments_of(
    files: Sequence[RankFile], shapes: Sequence[Mapping[str, Shape]], stage: int
) -> dict[str, list[Fragment]]:
    """Return where the fragments of every parameter are, in order.

    Raises Corrupt or Incomplete naming a file that is cut differently from what it should hold.
    """
    flats = [flat_sizes(file, stage) for file in files]
    for file, sizes in zip(files, flats, strict=True):
        if len(sizes) != len(shapes):
            raise Corrupt(f"{file.path} has {len(sizes)} partitions, and the model has {len(shapes)} groups")
    found: dict[str, list[Fragment]] = {}
    for group, members in enumerate(shapes):
        sizes = [each[group] for each in flats]
        if stage == 3:
            runs = _divided(members, sizes, files)
        elif all("param_slice_mappings" in zero_of(file) for file in files):
            runs = _mapped(members, (group, sizes), files)
        else:
            runs = _end_to_end(members, (group, sizes), files)
        for name, fragment in runs:
            found.setdefault(name, []).append(
                Fragment(fragment.file, group, fragment.start, fragment.first, fragment.numel)
            )
    return found


def check_padding(
    place: Place,
    files: Sequence[RankFile],
    flats: Sequence[Sequence[Any]],
    shapes: Mapping[int, Mapping[str, Shape]],
) -> None:
    """See that moments are zero where ZeRO-3 pads some groups. Raises Corrupt naming a file of another rank.

    `flats` are a moment's partitions, of each rank and group. Gradients are zero where there is padding, and
    the moments that come of them; masters are not. A file is another's only if some other is zero there.
    """

    def is_zero(rank: int, paddings: Sequence[tuple[int, str, int, int]]) -> bool:
        return all(
            _is_zero(place, files[rank], flats[rank][group], (start, stop))
            for group, _, start, stop in paddings
        )

    for number, file in enumerate(files):
        paddings = [
            (group, *padding)
            for group, members in shapes.items()
            for padding in _paddings(members, number, len(files))
        ]
        some = paddings[:: -(-len(paddings) // _MAX_PADDINGS) or 1]
        others = [rank for rank in range(len(files)) if rank != number]
        if not is_zero(number, some) and any(is_zero(rank, some) for rank in others):
            raise Corrupt(
                f"{file.path} has something where the exp_avg of {some[0][1]!r} is padded for rank {number} "
                f"of {len(files)}, and another rank's file has nothing there: it is another rank's under "
                "this one's name"
            )


def _paddings(members: Mapping[str, Shape], rank: int, world: int) -> Iterator[tuple[str, int, int]]:
    """Yield which parameters are padded in a rank's partition of ZeRO-3, and from where to where they are."""
    start = 0
    for name, shape in members.items():
        length = -(-math.prod(shape) // world)
        numel = min(length, max(0, math.prod(shape) - rank * length))
        if numel < length:
            yield name, start + numel, start + length
        start += length


def _is_zero(place: Place, file: RankFile, flat: Any, span: tuple[int, int]) -> bool:
    """Tell whether there is nothing but zeros, or NaN, in some elements of a flat fp32 tensor."""
    if not isinstance(flat, Stored) or flat.dtype != "float32" or span[1] > math.prod(flat.shape):
        return True  # it is refused where its parameters are read
    size = (min(span[1] - span[0], _MAX_PADDING),)
    bits = read_box(place, run_of(partial(file.archive.locate, flat), span[0], size), Box.whole(size))
    return not np.nan_to_num(bits.view(np.float32)).any()


def flat_sizes(file: RankFile, stage: int) -> list[int]:
    """Return how many elements a rank's partition of each group has. Raises Corrupt."""
    flats = zero_of(file).get(FLAT_3 if stage == 3 else FLAT)
    if not isinstance(flats, list) or any(len(getattr(flat, "shape", ())) != 1 for flat in flats):
        raise Corrupt(f"{file.path} lacks its partitions of the fp32 parameters")
    return [flat.shape[0] for flat in flats]


Runs = Iterator[tuple[str, Fragment]]


def _divided(members: Mapping[str, Shape], sizes: Sequence[int], files: Sequence[RankFile]) -> Runs:
    world = len(files)
    parts = {name: -(-math.prod(shape) // world) for name, shape in members.items()}
    for number, size in enumerate(sizes):
        if size != sum(parts.values()):
            raise Corrupt(
                f"{files[number].path} has a partition of {size} elements, and its group's parameters, "
                f"divided by {world}, take {sum(parts.values())}: is it of another world?"
            )
        start = 0
        for name, shape in members.items():
            first = number * parts[name]
            numel = min(parts[name], math.prod(shape) - first)
            if numel > 0:
                yield name, Fragment(number, 0, start, first, numel)
            start += parts[name]


def _mapped(
    members: Mapping[str, Shape], where: tuple[int, Sequence[int]], files: Sequence[RankFile]
) -> Runs:
    group, sizes = where
    reached = dict.fromkeys(members, 0)
    for number, file in enumerate(files):
        mappings = zero_of(file)["param_slice_mappings"]
        if not isinstance(mappings, list) or group >= len(mappings) or not isinstance(mappings[group], dict):
            raise Corrupt(f"{file.path} does not say which parameters its partition {group} holds")
        end = 0
        for name, (start, numel) in sorted(
            _addresses(file, mappings[group]).items(), key=lambda item: item[1]
        ):
            if name not in reached:
                raise Corrupt(f"{file.path} holds a part of {name!r}, which the model states do not list")
            if start < end or start + numel > sizes[number]:
                raise Corrupt(
                    f"{file.path}: elements {start} to {start + numel} of partition {group}, of {name!r}, "
                    f"overlap others or lie beyond its {sizes[number]}"
                )
            end = start + numel
            yield name, Fragment(number, group, start, reached[name], numel)
            reached[name] += numel
    _check_whole(members, reached, files)


def _addresses(file: RankFile, mapping: Mapping[Any, Any]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, address in mapping.items():
        start, numel = (
            address.field(key) if isinstance(address, Record) else None for key in ("start", "numel")
        )
        if type(start) is not int or type(numel) is not int or start < 0 or numel < 0:
            raise Corrupt(f"{file.path} does not say where its part of {name!r} is")
        if numel:
            found[str(name)] = (start, numel)
    return found


def _end_to_end(
    members: Mapping[str, Shape], where: tuple[int, Sequence[int]], files: Sequence[RankFile]
) -> Runs:
    group, sizes = where
    paddings = zero_of(files[0]).get("param_alignment_paddings")
    after = paddings[group] if isinstance(paddings, list) and len(paddings) > group else [0] * len(members)
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    reached, place = dict.fromkeys(members, 0), 0
    for (name, shape), padding in zip(members.items(), after, strict=True):
        stop = place + math.prod(shape)
        for number, begin in enumerate(begins):
            low, high = max(place, begin), min(stop, begin + sizes[number])
            if low < high:
                yield name, Fragment(number, group, low - begin, low - place, high - low)
                reached[name] += high - low
        place = stop + padding
    _check_whole(members, reached, files)


def _check_whole(members: Mapping[str, Shape], reached: Mapping[str, int], files: Sequence[RankFile]) -> None:
    for name, shape in members.items():
        if reached[name] != math.prod(shape):
            raise Incomplete(
                f"the {len(files)} files {files[0].path}, ... hold {reached[name]} of the {math.prod(shape)} "
                f"elements of {name!r}: is one of another step or world, or a copy of another's?"
            )
