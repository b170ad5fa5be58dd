"""Parameters, gradients and optimizer state in shards (FSDP2), each on some ranks: alone, or as replicas x shards.

Between steps a rank holds its rows of everything. In a new world the rows are cut anew, and what a rank lacks
comes from peers, box by box; nothing of what is held is given up before all of it is there.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard

from elastic.control.resharding import Arrangement, Cut, Move, arrange, lost_tensors, plan_moves
from elastic.training.exchange import gather_words
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.ports import World
from elastic.training.state import Learner, StateLost, check_model, check_origin, tensors_sha256
from elastic.training.units import Mould, Sharded, Wires

Leaf = tuple[str, str]
"""A parameter's name and the key of one of its optimizer states; of the parameter itself an empty one."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What is here: the rows of `cut` (None: none), and the rest of the state, which every rank holds alike."""

    cut: Cut | None
    rows: Mapping[Leaf, Tensor]
    rest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Live:
    """The model and optimizer that train in one world, and how its ranks share them."""

    world: World
    arrangement: Arrangement
    sharded: Sharded
    learner: Learner
    cuts: Sequence[Cut]
    gives: Sequence[bool]
    takes: Mapping[int, int]


class FullyShardedLearner:
    """A learner that holds a part of everything, which at least `copies` ranks of a world hold.

    `build` makes a learner of a model; `waiting` is entered while other ranks are waited for. `collect`, of a
    unit and its gradients by shard, is called in every backward.
    """

    def __init__(
        self,
        first: Learner,
        build: Callable[[nn.Module], Learner],
        copies: int,
        *,
        device: torch.device,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._build, self._copies, self._device, self._waiting = build, copies, device, waiting
        self._mould = Mould(first.model)
        self._seed = first.seed
        self._live: _Live | None = None
        self._held: _Held | None = self._whole(first.tree(0))
        self.collect: Callable[[int, Tensor], None] = lambda _, __: None

    @property
    def live(self) -> _Live:
        """What trains in the present world."""
        if self._live is None:
            raise RuntimeError("there is no model before the state is settled in a world")
        return self._live

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that have gradients, as far as they are here."""
        parameters = self._live.sharded.parameters.values() if self._live is not None else ()
        return [parameter for parameter in parameters if parameter.requires_grad]

    @property
    def model(self) -> nn.Module:
        """The model, of which this rank holds its shard."""
        return self.live.sharded.model

    @property
    def is_whole(self) -> bool:
        """Whether all of the state is here."""
        return self._live is not None and self._live.sharded.cut.shards == 1

    @property
    def is_replica(self) -> bool:
        """Whether every rank holds the same."""
        return False

    def update(self) -> None:
        """Apply the bound gradients to the rows that are here."""
        self.live.learner.update()

    def complete(self, world: World) -> None:
        """Do nothing: the next forward gathers what it needs."""

    def settle(self, world: World) -> None:
        """Cut the state anew for a world whose ranks stand at one step, and move what has to move.

        Raises Broken, having changed nothing, and StateLost if no rank has some of the rows any more.
        """
        held = self._hold()
        told = [held.cut.shards, held.cut.index] if held.cut else []
        cuts = [Cut(*each) if each else None for each in gather_words(world, told)]
        leaves, num_rows = self._leaves(held)
        if lost := lost_tensors(num_rows, cuts):
            names = sorted({leaves[number][0] for number in lost})
            raise StateLost(
                f"shards of {len(names)} of {len(self._mould.parameters)} parameters ({names[0]}, ...) were on "
                "lost ranks only"
            )
        arrangement = arrange(world.hosts, self._copies)
        wanted = [arrangement.cut(rank) for rank in range(world.size)]
        rows = self._make_room(held, leaves, wanted[world.rank])
        for (sender, receiver), moves in sorted(plan_moves(num_rows, cuts, wanted).items()):
            if world.rank == sender:
                sent = [
                    _part(held.rows[leaves[each.number]], _first(cuts[sender], num_rows[each.number]), each)
                    for each in moves
                ]
                hand_over(world, [receiver], Parcel(sent, "self"), self._device)
            if world.rank == receiver:
                taken = accept(world, sender, self._device).state
                for each, part in zip(moves, taken, strict=True):
                    first = _first(wanted[receiver], num_rows[each.number])
                    _part(rows[leaves[each.number]], first, each).copy_(part)
        self._go_live(world, arrangement, _Held(wanted[world.rank], rows, held.rest))

    def tree(self, step: int) -> dict[str, Any]:
        """Return what every rank holds alike of the state after `step` committed steps."""
        return {**self._hold().rest, "cursor": {"step": step}}

    def shares(self, step: int) -> dict[str, Any]:
        """Return the whole state, of which each rank holds its rows."""
        live, rest = self.live, self.tree(step)
        mesh = self._saving_mesh()
        named = {
            leaf: rows if mesh is None else self._as_saved(leaf[0], rows, mesh)
            for leaf, rows in self._hold().rows.items()
        }
        state = {name: dict(kept) for name, kept in rest["optimizer"]["state"].items()}
        for (name, key), tensor in named.items():
            if key:
                state[name][key] = tensor
        first = {id(parameter): name for name, parameter in self._mould.parameters.items()}
        model = {
            name: named[first[id(tensor)], ""] if id(tensor) in first else tensor
            for name, tensor in self._mould.tensors.items()
        }
        whole = {key: value for key, value in rest.items() if key != "sharded"}
        return {
            **whole,
            "model": model,
            "optimizer": {
                "state": state,
                "groups": live.learner.tree_without_model(step)["optimizer"]["groups"],
            },
        }

    def load(self, tree: Mapping[str, Any]) -> int:
        """Take over a state: a whole one, or one of `tree`. Raises Mismatch if it is another model's or seed's."""
        check_origin(tree, self._seed)
        self._held = _Held(None, {}, tree) if "sharded" in tree else self._whole(tree)
        self._live = None
        return int(tree["cursor"]["step"])

    def weights_sha256(self) -> str:
        """Hash the model; every rank of the world has to. Raises Broken."""
        names = {id(parameter): name for name, parameter in self._mould.parameters.items()}

        def whole(_: str, tensor: Tensor) -> Tensor:
            if id(tensor) not in names:
                return tensor
            name = names[id(tensor)]
            return self.whole(name, local_rows(self.live.sharded.parameters[name]))

        return tensors_sha256(self._mould.tensors, whole)

    def whole(self, name: str, local: Tensor) -> Tensor:
        """Gather a tensor of a parameter's shape, of which this rank has its rows. Raises Broken."""
        shape, shards = self._mould.parameters[name].shape, self.live.sharded.cut.shards
        length = -(-shape[0] // shards)
        padded = torch.zeros(shards, length, *shape[1:], dtype=local.dtype, device=local.device)
        padded[self.live.sharded.cut.index, : len(local)] = local
        self._gather(padded)
        return padded.flatten(0, 1)[: shape[0]]

    def exchange(self, send: Sequence[Tensor | None], receive: Sequence[Tensor | None]) -> None:
        """Swap tensors with the other ranks. Raises Broken."""
        with self._waiting():
            self.live.world.exchange(send, receive)

    def _gather(self, out: Tensor) -> None:
        """Fill in the parts of the other shards."""
        live, parts = self.live, out.view(self.live.sharded.cut.shards, -1)
        mine = parts[live.sharded.cut.index]
        self.exchange(
            [mine if gives else None for gives in live.gives],
            [parts[live.takes[rank]] if rank in live.takes else None for rank in range(live.world.size)],
        )

    def _go_live(self, world: World, arrangement: Arrangement, held: _Held) -> None:
        if held.cut is None:
            raise RuntimeError("a rank without rows cannot train")
        rows = {name: tensor for (name, key), tensor in held.rows.items() if not key}
        wires = Wires(self._gather, lambda unit, gradients: self.collect(unit, gradients))
        sharded = self._mould.pour(held.cut, rows, self._device, wires)
        learner = self._build(sharded.model)
        state = {name: dict(kept) for name, kept in held.rest["optimizer"]["state"].items()}
        for (name, key), tensor in held.rows.items():
            if key:
                state[name][key] = sharded.spread(name, tensor)
        learner.load_without_model({**held.rest, "optimizer": {**held.rest["optimizer"], "state": state}})
        mine, others = held.cut.index, [rank for rank in range(world.size) if rank != world.rank]
        takes = {
            arrangement.source(world.rank, each): each for each in range(arrangement.shards) if each != mine
        }
        gives = [
            rank in others and arrangement.source(rank, mine) == world.rank for rank in range(world.size)
        ]
        cuts = [arrangement.cut(rank) for rank in range(world.size)]
        self._live = _Live(world, arrangement, sharded, learner, cuts, gives, takes)
        self._held = None

    def _hold(self) -> _Held:
        """Return what is here, as plain tensors."""
        if self._held is not None:
            return self._held
        live = self.live
        rows = {(name, ""): local_rows(parameter) for name, parameter in live.sharded.parameters.items()}
        rest = live.learner.tree_without_model(0)
        state: dict[str, dict[str, Any]] = {}
        for name, kept in rest["optimizer"]["state"].items():
            spread = {key: value for key, value in kept.items() if isinstance(value, DTensor)}
            rows |= {(name, key): local_rows(value) for key, value in spread.items()}
            state[name] = {key: value for key, value in kept.items() if key not in spread}
        return _Held(live.sharded.cut, rows, self._rest(rest, state, rows))

    def _whole(self, tree: Mapping[str, Any]) -> _Held:
        """Return a whole state, as what a rank holds."""
        check_model(self._mould.tensors, tree["model"])
        shapes = {name: parameter.shape for name, parameter in self._mould.parameters.items()}
        rows = {(name, ""): tree["model"][name].detach() for name in shapes}
        state: dict[str, dict[str, Any]] = {}
        for name, kept in tree["optimizer"]["state"].items():
            spread = {
                key: value
                for key, value in kept.items()
                if isinstance(value, Tensor) and value.shape == shapes[name]
            }
            rows |= {(name, key): value for key, value in spread.items()}
            state[name] = {key: value for key, value in kept.items() if key not in spread}
        return _Held(Cut(1, 0), rows, self._rest(tree, state, rows))

    def _rest(
        self, tree: Mapping[str, Any], state: Mapping[str, Any], rows: Mapping[Leaf, Tensor]
    ) -> dict[str, Any]:
        """Return a state without the rows, and what rows there are."""
        shared = set(map(id, self._mould.parameters.values()))
        tensors = self._mould.tensors
        given = tree.get("model", tensors)
        return {
            **tree,
            "model": {name: given[name] for name, tensor in tensors.items() if id(tensor) not in shared},
            "optimizer": {**tree["optimizer"], "state": dict(state)},
            "sharded": sorted(
                [name, key, str(each.dtype).removeprefix("torch.")] for (name, key), each in rows.items()
            ),
        }

    def _leaves(self, held: _Held) -> tuple[list[Leaf], list[int]]:
        """List what is sharded, and how many rows each has; the same on every rank."""
        leaves: list[Leaf] = [(name, key) for name, key, _ in held.rest["sharded"]]
        return leaves, [self._mould.parameters[name].shape[0] for name, _ in leaves]

    def _make_room(self, held: _Held, leaves: Sequence[Leaf], cut: Cut) -> dict[Leaf, Tensor]:
        """Make memory for the rows of a cut, with those that are here already."""
        made = {}
        for leaf, (name, _, dtype) in zip(leaves, held.rest["sharded"], strict=True):
            shape = self._mould.parameters[name].shape
            wanted, own = cut.rows(shape[0]), held.cut.rows(shape[0]) if held.cut else range(0)
            rows = torch.empty(len(wanted), *shape[1:], dtype=getattr(torch, dtype), device=self._device)
            start, stop = max(wanted.start, own.start), min(wanted.stop, own.stop)
            if start < stop:
                rows[start - wanted.start : stop - wanted.start] = held.rows[leaf][
                    start - own.start : stop - own.start
                ]
            made[leaf] = rows
        return made

    def _saving_mesh(self) -> DeviceMesh | None:
        """Return how the shards lie on the ranks, as a mesh of (replicas x) shards; None if each is whole."""
        live = self.live
        order, shards = live.arrangement.order, live.arrangement.shards
        if shards == 1:
            return None
        teams = torch.tensor(order[: len(order) // shards * shards]).view(-1, shards)
        places = teams if len(order) % shards == 0 else teams[0]
        return DeviceMesh(self._device.type, places, _init_backend=False, _rank=live.world.rank)

    def _as_saved(self, name: str, rows: Tensor, mesh: DeviceMesh) -> DTensor:
        """Return rows as a part of a whole tensor; on a rank whose rows others write, as no part of it."""
        parameter = self._mould.parameters[name]
        placements = (Replicate(), Shard(0))[-mesh.ndim :]
        return DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )


def local_rows(tensor: Any) -> Tensor:
    """Return the rows of a DTensor that are here."""
    with torch.no_grad():
        local: Tensor = tensor.to_local()
        return local


def _part(rows: Tensor, first: int, move: Move) -> Tensor:
    """Return the moved ones of rows that begin with row number `first`."""
    return rows[move.start - first : move.stop - first]


def _first(cut: Cut | None, num_rows: int) -> int:
    return cut.rows(num_rows).start if cut else 0
