"""A rank's part of a sharded state: its rows of each sharded tensor, and the rest, alike on every rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elastic.control.resharding import Cut, Move, lost_tensors, plan_moves
from elastic.errors import JobRejected
from elastic.training.exchange import gather_words
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.ports import World
from elastic.training.state import StateLost

Leaf = tuple[str, str]
"""A parameter's name and the key of one of its optimizer states; of the parameter itself an empty one."""

Shapes = Mapping[str, torch.Size]
"""The whole shapes of the sharded parameters; what has one of them in the optimizer is sharded with it."""


@dataclass(frozen=True, slots=True)
class Holding:
    """The rows of `cut` (None: none), and a state without rows, whose "sharded" lists what has rows."""

    cut: Cut | None
    rows: Mapping[Leaf, Tensor]
    rest: Mapping[str, Any]


def take_apart(tree: Mapping[str, Any], shapes: Shapes, cut: Cut) -> Holding:
    """Take a state apart whose sharded tensors are whole, or DTensors of which the rows of `cut` are here."""
    rows: dict[Leaf, Tensor] = {(name, ""): local_rows(tree["model"][name]) for name in shapes}
    state: dict[str, dict[str, Any]] = {}
    for name, kept in tree["optimizer"]["state"].items():
        spread = [
            key
            for key, value in kept.items()
            if isinstance(value, Tensor) and value.shape == shapes.get(name)
        ]
        rows |= {(name, key): local_rows(kept[key]) for key in spread}
        alike = {key: _whole(value) for key, value in kept.items() if key not in spread}
        if other := [key for key, each in alike.items() if isinstance(each, DTensor)]:
            raise JobRejected(
                f"the optimizer keeps {other[0]!r} of {name} in another shape than the parameter's, which "
                "cannot be cut anew with it: set training.parameter_copies = 0"
            )
        state[name] = alike
    rest = {
        **tree,
        "model": {name: tensor for name, tensor in tree["model"].items() if name not in shapes},
        "optimizer": {**tree["optimizer"], "state": state},
        "sharded": sorted(
            [name, key, str(each.dtype).removeprefix("torch.")] for (name, key), each in rows.items()
        ),
    }
    return Holding(cut, rows, rest)


def put_together(holding: Holding, spread: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Return the state again, with what `spread` makes of a parameter's name and rows."""
    model, optimizer = dict(holding.rest["model"]), holding.rest["optimizer"]
    state = {name: dict(kept) for name, kept in optimizer["state"].items()}
    for (name, key), rows in holding.rows.items():
        if key:
            state[name][key] = spread(name, rows)
        else:
            model[name] = spread(name, rows)
    rest = {key: value for key, value in holding.rest.items() if key != "sharded"}
    return {**rest, "model": model, "optimizer": {**optimizer, "state": state}}


def cut_anew(
    world: World, holding: Holding, wanted: Sequence[Cut], shapes: Shapes, device: torch.device
) -> tuple[Holding, int]:
    """Come to hold the rows of `wanted[rank]`: those that are here already, and the others from peers. Return
    that, and how many pieces came.

    Raises Broken, and StateLost if no rank has some of the rows any more; the holding stays as it is.
    """
    told = [holding.cut.shards, holding.cut.index] if holding.cut else []
    cuts = [Cut(*each) if each else None for each in gather_words(world, told)]
    leaves: list[Leaf] = [(name, key) for name, key, _ in holding.rest["sharded"]]
    num_rows = [shapes[name][0] for name, _ in leaves]
    if lost := lost_tensors(num_rows, cuts):
        raise StateLost(
            f"rows of {len(lost)} of {len(leaves)} sharded tensors ({leaves[lost[0]][0]}, ...) were on lost "
            "ranks only"
        )
    made = _make_room(holding, wanted[world.rank], shapes, device)

    def part(rows: Mapping[Leaf, Tensor], cut: Cut | None, move: Move) -> Tensor:
        first = cut.rows(num_rows[move.number]).start if cut else 0
        return rows[leaves[move.number]][move.start - first : move.stop - first]

    planned = plan_moves(num_rows, cuts, wanted)
    for (sender, receiver), moves in sorted(planned.items()):
        if world.rank == sender:
            sent = [part(holding.rows, cuts[sender], each) for each in moves]
            hand_over(world, [receiver], Parcel(sent, "self"), device)
        if world.rank == receiver:
            for each, taken in zip(moves, accept(world, sender, device).state, strict=True):
                part(made, wanted[receiver], each).copy_(taken)
    num_taken = sum(len(moves) for (_, receiver), moves in planned.items() if receiver == world.rank)
    return Holding(wanted[world.rank], made, holding.rest), num_taken


def local_rows(tensor: Tensor) -> Tensor:
    """Return what is here of a tensor: the rows of a DTensor, all of another one."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _whole(value: Any) -> Any:
    """Return as a plain tensor what torch makes of whole tensors in a list with rows."""
    if isinstance(value, DTensor) and all(placement.is_replicate() for placement in value.placements):
        return value.to_local()
    return value


def _make_room(holding: Holding, cut: Cut, shapes: Shapes, device: torch.device) -> dict[Leaf, Tensor]:
    """Make memory for the rows of a cut, with those that are here already."""
    made: dict[Leaf, Tensor] = {}
    for name, key, dtype in holding.rest["sharded"]:
        num_rows, *others = shapes[name]
        wanted = cut.rows(num_rows)
        made[name, key] = torch.empty(len(wanted), *others, dtype=getattr(torch, dtype), device=device)
        own = holding.cut.rows(num_rows) if holding.cut else range(0)
        start, stop = max(wanted.start, own.start), min(wanted.stop, own.stop)
        if start < stop:
            here = holding.rows[name, key][start - own.start : stop - own.start]
            made[name, key][start - wanted.start : stop - wanted.start] = here
    return made
