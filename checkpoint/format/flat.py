"""Flat partitions: tensors end to end in one buffer that ranks divide evenly, as ZeRO and FSDP1 do. Pure.

ZeRO-1 and 2 flatten all parameters of a group into one buffer, pad it, and give each rank an equal part;
ZeRO-3 and FSDP do so tensor by tensor or unit by unit. A part cuts tensors anywhere, so a rank's share of
one is a run of its raveled elements: a few boxes (`boxes_of_run`). Padding belongs to no tensor and so to no
share. (Rajbhandari et al., ZeRO, SC 2020.)
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from checkpoint.errors import FormatError
from checkpoint.format.box import Box, boxes_of_run, runs_of
from checkpoint.format.layout import (
    FlatGroup,
    Layout,
    Only,
    Part,
    Partial,
    Replicate,
    SectionShard,
    Shard,
    Spread,
    StridedShard,
    local_shape,
    parts_of,
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FlatPlan:
    """Where a group's tensors lie in the buffer of one set of ranks, and how it is divided; in elements."""

    starts: Mapping[str, int]
    part_length: int


def plan_flat(group: FlatGroup, numels: Mapping[str, int], num_parts: int) -> FlatPlan:
    """Lay tensors of so many elements end to end, in the group's order, and divide the buffer.

    Raises FormatError if the group's multiples cannot be.
    """
    if group.start_multiple < 1 or group.part_multiple < 1:
        raise FormatError(f"a flat group aligns to multiples of at least one element, not {group}")
    starts, end = {}, 0
    for name in group.names:
        if name in numels:
            starts[name] = _round_up(end, group.start_multiple)
            end = starts[name] + numels[name]
    part_length = _round_up(-(-end // num_parts), group.part_multiple)
    return FlatPlan(starts, part_length)


def share_of(layout: Layout, shapes: Shapes, rank: int) -> dict[str, tuple[Part, ...]]:
    """Return what one rank holds of every tensor of a layout, those of flat groups included.

    `shapes` has the global shape of each. A tensor of which the rank holds nothing has no parts. In a flat
    group, a part's `local` is a run of the rank's own part of the buffer, which begins at 0.

    Raises FormatError if a name is missing or in two groups, or if an axis of its group divides a tensor too.
    """
    _check_groups(layout, shapes)
    share = {
        name: parts_of(Spread(layout.mesh, placements), shapes[name], rank)
        for name, placements in layout.placements.items()
    }
    for group in layout.flats:
        share.update(_flat_share(layout, group, shapes, rank))
    return share


def flat_plan_of(layout: Layout, group: FlatGroup, shapes: Shapes, rank: int) -> FlatPlan:
    """Return how the ranks that divide the group together with this one lay it out."""
    sizes = dict(layout.mesh.axes)
    numels = {name: math.prod(local) for name, local in _local_shapes(layout, group, shapes, rank).items()}
    return plan_flat(group, numels, math.prod(sizes[axis] for axis in group.axes))


def cover_in(layout: Layout, shapes: Shapes) -> Iterator[tuple[str, Box]]:
    """Yield (name, box) for boxes that ranks hold and that cover every tensor of a layout exactly once.

    Copies of a tensor may be cut at different places: it lies elsewhere in the flat buffer of another tensor
    rank or pipeline stage, which holds other tensors too. So of the ranks that hold copies, those at the
    first coordinates say where it is cut. Takes as long as there are boxes, however many the ranks.
    """
    _check_groups(layout, shapes)
    group_of = {name: number for number, group in enumerate(layout.flats) for name in group.names}
    plans: dict[tuple[int, int], FlatPlan] = {}
    for name, placements in layout.placements.items():
        spread, number = Spread(layout.mesh, placements), group_of.get(name)
        for rank in _first_holders(spread, shapes[name]):
            parts: Iterable[Part] = parts_of(spread, shapes[name], rank)
            if number is not None:
                if (number, rank) not in plans:
                    plans[number, rank] = flat_plan_of(layout, layout.flats[number], shapes, rank)
                local = local_shape(spread, shapes[name], rank)
                parts = _parts_of_all(parts, local, plans[number, rank], name)
            yield from ((name, part.box) for part in parts)


def part_number(layout: Layout, axes: Sequence[str], rank: int) -> int:
    """Return which part of a group over these axes is the rank's: row-major, the last axis fastest."""
    coordinates, number = layout.mesh.coordinates(rank), 0
    for axis in axes:
        place = layout.mesh.axis(axis)
        number = number * layout.mesh.axes[place][1] + coordinates[place]
    return number


def _flat_share(layout: Layout, group: FlatGroup, shapes: Shapes, rank: int) -> dict[str, tuple[Part, ...]]:
    plan = flat_plan_of(layout, group, shapes, rank)
    begin = part_number(layout, group.axes, rank) * plan.part_length
    locals_ = _local_shapes(layout, group, shapes, rank)
    share: dict[str, tuple[Part, ...]] = {}
    for name in group.names:
        share[name] = ()
        if name in locals_:
            parts = parts_of(Spread(layout.mesh, layout.placements[name]), shapes[name], rank)
            offset = plan.starts[name] - begin
            share[name] = tuple(_flat_parts(parts, locals_[name], offset, plan.part_length))
    return share


def _first_holders(spread: Spread, shape: tuple[int, ...]) -> Iterator[int]:
    """Yield one rank for each different share that placements make of a tensor.

    No more ranks of an axis than a dim is long find something of it.
    """
    places: list[Iterable[int]] = []
    for (_, ranks), placement in zip(spread.mesh.axes, spread.placements, strict=True):
        match placement:
            case Only(coordinates):
                places.append(coordinates[:1])
            case Shard(dim) | StridedShard(dim):
                places.append(range(min(ranks, shape[dim])))
            case SectionShard():
                places.append(range(ranks))
            case Replicate() | Partial():
                places.append((0,))
    for coordinates in product(*places):
        yield spread.mesh.rank_at(coordinates)


def _parts_of_all(
    parts: Iterable[Part], local: tuple[int, ...] | None, plan: FlatPlan, name: str
) -> Iterator[Part]:
    """Yield what all ranks that divide a flat buffer hold of a tensor."""
    if local is None or not math.prod(local):
        return
    start = plan.starts[name]
    last = (start + math.prod(local) - 1) // plan.part_length
    for number in range(start // plan.part_length, last + 1):
        yield from _flat_parts(parts, local, start - number * plan.part_length, plan.part_length)


def _flat_parts(
    parts: Iterable[Part], local: tuple[int, ...], offset: int, part_length: int
) -> Iterator[Part]:
    """Yield what the rank's part holds of a tensor that begins `offset` elements after the part does."""
    numel = math.prod(local)
    first, stop = max(0, -offset), min(numel, part_length - offset)
    if stop <= first:
        return
    for box in boxes_of_run(local, first, stop):
        for part in parts:
            common = box.intersect(part.local)
            if common is None:
                continue
            for run, start in runs_of(common, local):
                yield Part(run.moved(part.local.start, part.box.start), Box((start + offset,), (run.numel,)))


def _local_shapes(layout: Layout, group: FlatGroup, shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of the rank's own tensor before it is flattened, for those that it has."""
    found = {}
    for name in group.names:
        local = local_shape(Spread(layout.mesh, layout.placements[name]), shapes[name], rank)
        if local is not None:
            found[name] = local
    return found


def _check_groups(layout: Layout, shapes: Shapes) -> None:
    missing = sorted(layout.placements.keys() - shapes.keys())
    if missing:
        raise FormatError(f"the layout places {missing[:5]}, whose shapes are not given")
    seen: set[str] = set()
    for group in layout.flats:
        axes = [layout.mesh.axis(axis) for axis in group.axes]
        for name in group.names:
            if name in seen or name not in layout.placements:
                raise FormatError(f"tensor {name!r} is in two flat groups, or in no placement")
            seen.add(name)
            if not all(layout.placements[name][axis] == Replicate() for axis in axes):
                raise FormatError(f"tensor {name!r} is divided over an axis of its flat group {group.axes}")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
