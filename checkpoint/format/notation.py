"""Layouts as plain JSON, to be kept in a manifest. Equal placements are written once for all tensors."""

from collections.abc import Mapping
from typing import Any

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.json_fields import Fields
from checkpoint.format.layout import (
    FlatGroup,
    Layout,
    Mesh,
    Only,
    Partial,
    Placement,
    Replicate,
    SectionShard,
    Shard,
    StridedShard,
)
from checkpoint.format.tree import Json

MAX_TENSORS = 1 << 22
MAX_RANKS = 1 << 20
MAX_DIMS = 32
_MAX_ELEMENTS = 1 << 60
_NAME = r".{1,4096}"
_AXIS = r"[A-Za-z_][A-Za-z0-9_]{0,63}"


def layout_to_json(layout: Layout) -> Json:
    """Return a layout as plain data; `layout_from_json` returns the same layout."""
    alike: dict[tuple[Placement, ...], list[Json]] = {}
    for name, placements in layout.placements.items():
        alike.setdefault(placements, []).append(name)
    return {
        "axes": [[axis, ranks] for axis, ranks in layout.mesh.axes],
        "ranks": list(layout.mesh.ranks),
        "tensors": [
            {"placements": [_to_json(one) for one in placements], "names": names}
            for placements, names in alike.items()
        ],
        "flats": [
            {
                "names": list(flat.names),
                "axes": list(flat.axes),
                "start_multiple": flat.start_multiple,
                "part_multiple": flat.part_multiple,
            }
            for flat in layout.flats
        ],
    }


def layout_from_json(node: Json) -> Layout:
    """Read what `layout_to_json` returned; the data may be hostile. Raises Corrupt."""
    fields = Fields(node, "a layout")
    axes = tuple(_axis(item) for item in fields.items("axes", MAX_DIMS))
    ranks = tuple(_count(item, MAX_RANKS) for item in fields.items("ranks", MAX_RANKS))
    try:
        mesh = Mesh(axes, ranks)
    except FormatError as error:
        raise Corrupt(f"a layout has no sound mesh: {error}") from error
    if mesh.size > MAX_RANKS:
        raise Corrupt(f"a layout has a mesh of {mesh.size} ranks; at most {MAX_RANKS} are possible")
    placements: dict[str, tuple[Placement, ...]] = {}
    for item in fields.items("tensors", MAX_TENSORS):
        placements |= _tensors(item, placements)
    flats = tuple(_flat(item) for item in fields.items("flats", MAX_TENSORS))
    fields.end()
    return Layout(mesh, placements, flats)


def _to_json(placement: Placement) -> Json:
    match placement:
        case Replicate():
            return {"kind": "replicate"}
        case Partial():
            return {"kind": "partial"}
        case Only(coordinates):
            return {"kind": "only", "coordinates": list(coordinates)}
        case Shard(dim):
            return {"kind": "shard", "dim": dim}
        case StridedShard(dim, split):
            return {"kind": "strided", "dim": dim, "split": split}
        case SectionShard(dim, sections):
            return {"kind": "sections", "dim": dim, "sections": [list(sizes) for sizes in sections]}


def _placement(node: Json) -> Placement:
    fields = Fields(node, "a placement")
    kind = fields.text("kind", r"[a-z]{1,16}")
    placement: Placement
    match kind:
        case "replicate":
            placement = Replicate()
        case "partial":
            placement = Partial()
        case "only":
            placement = Only(_counts(fields.items("coordinates", MAX_RANKS), MAX_RANKS))
        case "shard":
            placement = Shard(fields.count("dim", MAX_DIMS))
        case "strided":
            placement = StridedShard(fields.count("dim", MAX_DIMS), fields.count("split", MAX_RANKS))
        case "sections":
            dim, sections = fields.count("dim", MAX_DIMS), fields.items("sections", MAX_RANKS)
            placement = SectionShard(dim, tuple(_counts(sizes, _MAX_ELEMENTS) for sizes in sections))
        case _:
            raise Corrupt(f"there is no placement of the kind {kind!r}")
    fields.end()
    return placement


def _tensors(node: Json, known: Mapping[str, Any]) -> dict[str, tuple[Placement, ...]]:
    fields = Fields(node, "the tensors of a layout")
    placements = tuple(_placement(item) for item in fields.items("placements", MAX_DIMS))
    names = _names(fields.items("names", MAX_TENSORS), _NAME)
    fields.end()
    if len(set(names)) != len(names) or any(name in known for name in names):
        raise Corrupt("a layout places a tensor twice")
    return dict.fromkeys(names, placements)


def _flat(node: Json) -> FlatGroup:
    fields = Fields(node, "a flat group")
    names = _names(fields.items("names", MAX_TENSORS), _NAME)
    axes = _names(fields.items("axes", MAX_DIMS), _AXIS)
    starts = fields.count("start_multiple", _MAX_ELEMENTS)
    parts = fields.count("part_multiple", _MAX_ELEMENTS)
    fields.end()
    return FlatGroup(names, axes, starts, parts)


def _axis(node: Json) -> tuple[str, int]:
    if not isinstance(node, list) or len(node) != 2:
        raise Corrupt(f"an axis of a mesh is a name and a number, not {str(node)[:80]!r}")
    return _names(node[:1], _AXIS)[0], _count(node[1], MAX_RANKS)


def _names(nodes: list[Json], pattern: str) -> tuple[str, ...]:
    return tuple(Fields({"name": node}, "a list of names").text("name", pattern) for node in nodes)


def _counts(node: Json, limit: int) -> tuple[int, ...]:
    return tuple(
        _count(item, limit) for item in Fields({"list": node}, "a placement").items("list", MAX_RANKS)
    )


def _count(node: Json, limit: int) -> int:
    return Fields({"number": node}, "a layout").count("number", limit)
