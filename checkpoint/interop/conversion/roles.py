"""What the tensors of a universal checkpoint are to a layout, as far as names and shapes tell. Pure.

A layout decides which chunks there are, and who would store them; any other layout restores from them all the
same. So a guess that a framework would not share costs reading a little more, never an element. Rules, where
they are given, take the guess's place (`ruled.py`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from checkpoint.engine.plan import Piece, TensorSpec
from checkpoint.errors import Misuse
from checkpoint.format.flat import cover_in
from checkpoint.format.layout import Layout, Placement, Shard
from checkpoint.format.scheme import Role, Scheme, arrange
from checkpoint.format.stages import ExpertMap, StageMap, deal_layers

LAYER = r"(?:^|.*[./])(?:layers|layer|blocks|block|h)\.(?P<number>\d+)\..*"
EXPERT = r".*\.experts\.(?P<number>\d+)\..*"
_STATE = re.compile(r"optimizer/state/(?P<parameter>.+)/(?P<state>[^/]+)")
_EMBEDDING = re.compile(r".*(?:emb|wte|wpe)[^/]*")
_STACKED_EXPERTS = re.compile(r".*\.experts\.[^./]*")
_ROW_PARALLEL = re.compile(
    r".*[./](?:o_proj|down_proj|out_proj|c_proj|wo|w2|fc2|dense_4h_to_h|linear_proj|linear_fc2|row|proj|o|down)"
    r"(?:\.weight)?"
)

MAX_RANKS = 1 << 16
MAX_BOXES = 1 << 20  # an index of about 100 MB
_WRITER = (0,)
_MOST_COUNTED = 1 << 20

OnAxes = Mapping[str, Mapping[str, Placement]]  # by parameter, then by axis


@dataclass(frozen=True, slots=True)
class Owned:
    """An optimizer's tensor: of which parameter, and what it is of it."""

    parameter: str
    state: str


def owner_of(name: str) -> Owned | None:
    """Return which parameter's state a universal name is; None if it is no optimizer's."""
    found = _STATE.fullmatch(name)
    return Owned(found["parameter"], found["state"]) if found else None


def lay_out(specs: Sequence[TensorSpec], scheme: Scheme, on: OnAxes | None = None) -> Layout:
    """Return where tensors lie under a scheme. `on` says what axes do with parameters; else names tell.

    An optimizer's state lies as its parameter does, if it is of its shape; ZeRO divides it as one buffer for
    each kind of state. Raises FormatError if there are fewer layers than stages.
    """
    shapes = {spec.name.removeprefix("model/"): spec.shape for spec in specs if not owner_of(spec.name)}
    owned = {spec.name: owner_of(spec.name) for spec in specs}
    parameters = {one.parameter if one else name.removeprefix("model/") for name, one in owned.items()}
    known = by_names(parameters, shapes, scheme) if on is None else on
    roles: dict[str, Role] = {}
    for spec in specs:
        one = owned[spec.name]
        parameter = one.parameter if one else spec.name.removeprefix("model/")
        placed = known.get(parameter, {})
        is_alike = one is None or shapes.get(parameter, spec.shape) == spec.shape
        if not (is_alike and spec.shape):
            placed = {axis: place for axis, place in placed.items() if not hasattr(place, "dim")}
        is_buffered = one is not None and bool(spec.shape)
        roles[spec.name] = Role(spec.shape, placed, one.state if one and is_buffered else "")
    return arrange(scheme, roles)


def pieces_of(layout: Layout, specs: Sequence[TensorSpec]) -> list[Piece]:
    """Return the boxes that a layout's ranks hold, each element in one of them; a conversion writes them all.

    Raises Misuse for a layout that has too many ranks or makes too many boxes to be meant.
    """
    if layout.mesh.size > MAX_RANKS:
        raise Misuse(
            f"a checkpoint is cut for at most {MAX_RANKS} ranks, and this layout has {layout.mesh.size}: "
            "any layout restores from the chunks of any other, so cut it for fewer"
        )
    numbers = {spec.name: number for number, spec in enumerate(specs)}
    cover = islice(cover_in(layout, {spec.name: spec.shape for spec in specs}), MAX_BOXES + 1)
    pieces = [Piece(numbers[name], box, _WRITER) for name, box in cover]
    if len(pieces) > MAX_BOXES:
        raise Misuse(
            f"this layout of {layout.mesh.size} ranks cuts the tensors into more than {MAX_BOXES} chunks: "
            "any layout restores from the chunks of any other, so cut it for fewer ranks"
        )
    return pieces


def by_names(parameters: Iterable[str], shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> OnAxes:
    """Guess what axes do with parameters: columns, rows, layers, experts."""
    axes, names = dict(scheme.mesh.axes), sorted(parameters)
    stages = _stages(names, axes.get("pipeline", 1))
    experts = _experts(names, axes.get("expert", 1))
    found: dict[str, dict[str, Placement]] = {name: {} for name in names}
    for name, placed in found.items():
        num_dims = len(shapes.get(name, ()))
        if axes.get("tensor", 1) > 1 and num_dims > 1:
            placed["tensor"] = Shard(num_dims - 1 if _ROW_PARALLEL.fullmatch(f"/{name}") else num_dims - 2)
        if stages is not None:
            placed["pipeline"] = stages.placement(name)
        if experts is not None and (expert := experts.placement(name)):
            placed["expert"] = expert
        elif axes.get("expert", 1) > 1 and num_dims > 2 and _STACKED_EXPERTS.fullmatch(name):
            placed["expert"] = Shard(0)
    return found


def _stages(names: Sequence[str], num_stages: int) -> StageMap | None:
    """Deal layers to stages; embeddings go to the first, the rest to the last."""
    numbers = [int(found["number"]) for name in names if (found := re.fullmatch(LAYER, name))]
    if num_stages == 1:
        return None
    ends = {
        re.escape(name): (0,) if _EMBEDDING.fullmatch(name) else (num_stages - 1,)
        for name in names
        if not re.fullmatch(LAYER, name)
    }
    return StageMap(deal_layers(_counted(numbers, "layers"), num_stages), ends, LAYER)


def _counted(numbers: Sequence[int], what: str) -> int:
    """Return how many there are by the highest of their numbers. Raises Misuse for more than there can be."""
    count = max(numbers, default=-1) + 1
    if count > _MOST_COUNTED:
        raise Misuse(
            f"by its names this checkpoint has {count} {what}: name the rules of its model (--rules)"
        )
    return count


def _experts(names: Sequence[str], num_ranks: int) -> ExpertMap | None:
    numbers = [int(found["number"]) for name in names if (found := re.fullmatch(EXPERT, name))]
    if num_ranks == 1 or not numbers:
        return None
    count = _counted(numbers, "experts")
    return ExpertMap(tuple(number * num_ranks // count for number in range(count)), EXPERT)
