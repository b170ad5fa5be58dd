"""Schemes: a whole layout in a line, as people write it, and how it is worked out for a model. Pure.

    layout  = item ("," item)*
    item    = axis "=" count | "zero=" (1 | 2 | 3) | "align=" count
    axis    = "replica" | "shard" | "tensor" | "pipeline" | "expert" | "context"

Axes are given outermost first: the last one varies fastest with the rank. `shard` divides dim 0 of every
tensor, as FSDP2 does; `zero` divides flat buffers over the replicas; others do what a tensor's role says.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpoint.errors import FormatError
from checkpoint.format.layout import (
    AXES,
    FlatGroup,
    Layout,
    Mesh,
    Placement,
    Replicate,
    SectionShard,
    Shard,
    StridedShard,
)

MAX_RANKS = 1 << 20
_COPIES = ("replica", "expert", "context")  # what ZeRO divides over, as far as a tensor is replicated there
_ITEM = re.compile(r"([A-Za-z_]+)\s*=\s*([0-9]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a whole state is spread: over which axes, and at which stage ZeRO divides it.

    Stages 1 and 2 divide the optimizer's buffers over the replicas, stage 3 every tensor by itself. Each
    rank's part of a buffer is a multiple of `align` elements.
    """

    mesh: Mesh
    zero: int = 0
    align: int = 1


@dataclass(frozen=True, slots=True)
class Role:
    """What one tensor is to a scheme: how axes divide it, and in which optimizer buffer it lies, if any."""

    shape: tuple[int, ...]
    on: Mapping[str, Placement] = field(default_factory=dict)
    buffer: str = ""


def parse_layout(text: str) -> Scheme:
    """Read a layout such as "replica=2,shard=4,tensor=2". Raises FormatError saying what is wrong with it."""
    items: dict[str, int] = {}
    for item in text.split(","):
        found = _ITEM.fullmatch(item.strip())
        if not found:
            raise FormatError(
                f"{item.strip()!r} in the layout {text!r} is not an axis and a number: {_EXAMPLE}"
            )
        name, count = found[1], int(found[2])
        if name not in (*AXES, "zero", "align"):
            raise FormatError(
                f"the layout {text!r} names {name!r}; there are {', '.join(AXES)}, zero and align"
            )
        if name in items:
            raise FormatError(f"the layout {text!r} names {name!r} twice")
        if not 1 <= count <= MAX_RANKS:
            raise FormatError(f"{name!r} of the layout {text!r} cannot be {count}: from 1 to {MAX_RANKS}")
        items[name] = count
    zero, align = items.pop("zero", 0), items.pop("align", 1)
    scheme = Scheme(Mesh(tuple(items.items())), zero, align)
    _check(scheme, text)
    return scheme


def format_layout(scheme: Scheme) -> str:
    """Write a scheme as `parse_layout` reads it."""
    items = [f"{axis}={count}" for axis, count in scheme.mesh.axes]
    if scheme.zero:
        items.append(f"zero={scheme.zero}")
    if scheme.align > 1:
        items.append(f"align={scheme.align}")
    return ",".join(items)


def arrange(scheme: Scheme, roles: Mapping[str, Role]) -> Layout:
    """Work out where every tensor lies, and which flat groups divide them.

    Raises FormatError naming the tensor whose role the scheme cannot serve.
    """
    placements = {name: _placements(scheme.mesh, name, role) for name, role in roles.items()}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, role in roles.items():
        axes = tuple(
            axis
            for (axis, _), placement in zip(scheme.mesh.axes, placements[name], strict=True)
            if axis in _COPIES and placement == Replicate()
        )
        if axes and scheme.zero == 3:
            groups[name, axes] = [name]
        elif axes and scheme.zero and role.buffer:
            groups.setdefault((role.buffer, axes), []).append(name)
    flats = (FlatGroup(tuple(names), axes, 1, scheme.align) for (_, axes), names in groups.items())
    return Layout(scheme.mesh, placements, tuple(flats))


def _placements(mesh: Mesh, name: str, role: Role) -> tuple[Placement, ...]:
    placements: list[Placement] = []
    for place, (axis, _) in enumerate(mesh.axes):
        if axis == "shard" and axis not in role.on:
            placements.append(_fully_sharded(mesh, place, name, role))
        else:
            placements.append(role.on.get(axis, Replicate()))
    return tuple(placements)


def _fully_sharded(mesh: Mesh, place: int, name: str, role: Role) -> Placement:
    """Divide dim 0, after the axes further in have: what they divide is what this axis finds."""
    if not role.shape:
        return Replicate()
    split = 1
    for axis, ranks in mesh.axes[place + 1 :]:
        match role.on.get(axis):
            case Shard(dim=0):
                split *= ranks
            case SectionShard(dim=0) | StridedShard(dim=0):
                raise FormatError(
                    f"tensor {name!r}: axis {axis!r} divides dim 0 into sections, 'shard' cannot too"
                )
    return StridedShard(0, split) if split > 1 else Shard(0)


def _check(scheme: Scheme, text: str) -> None:
    if not scheme.mesh.axes:
        raise FormatError(f"the layout {text!r} names no axis: {_EXAMPLE}")
    if scheme.mesh.size > MAX_RANKS:
        raise FormatError(
            f"the layout {text!r} has {scheme.mesh.size} ranks; at most {MAX_RANKS} are possible"
        )
    if scheme.zero > 3:
        raise FormatError(f"the layout {text!r} wants ZeRO stage {scheme.zero}; there are 1, 2 and 3")
    if scheme.zero and "replica" not in dict(scheme.mesh.axes):
        raise FormatError(f"the layout {text!r} has no replicas for ZeRO to divide over: add replica=N")


_EXAMPLE = "write it like replica=2,shard=4,tensor=2"
