"""Parameters, gradients and optimizer state in shards (FSDP2), alone or as replicas x shards (HSDP).

Between steps a rank holds its rows of everything. In a new world the rows are cut anew, and what a rank lacks
comes from peers, box by box; nothing of what is held is given up before all of it is there.
"""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication

from elastic.control.resharding import Arrangement, Cut, arrange
from elastic.training.elementwise import NoPartialSums, only_elements
from elastic.training.exchange import meet
from elastic.training.holdings import Holding, cut_anew, local_rows, put_together, take_apart
from elastic.training.lockstep import GATHER, Lockstep
from elastic.training.ports import World
from elastic.training.readings import no_readings
from elastic.training.replicas import Replicated, held_alike, leaf_name
from elastic.training.state import Learner, check_model, check_origin, tensors_sha256
from elastic.training.units import Mould, Sharded, Wires


@dataclass(frozen=True, slots=True)
class Live:
    """The model and the optimizer that train in one world, and how its ranks share them: `cuts[rank]` is what
    each holds, `takers` whom this one gives its shard, `givers` who gives it which other one.

    The world may be over: whoever leaves it drops its groups.
    """

    world: World
    arrangement: Arrangement
    sharded: Sharded
    learner: Learner
    cuts: Sequence[Cut]
    takers: frozenset[int]
    givers: Mapping[int, int]
    lockstep: Lockstep


class FullyShardedLearner:
    """A learner that holds a part of everything, which at least `copies` ranks of a world hold.

    `build` makes a learner of a model; `waiting` is entered while other ranks are waited for. `collect`, of a
    unit's number and its gradients by shard, is called in every backward.
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
        self._seed = first.seed
        self._mould = Mould(first.model)
        self._is_watched = False
        self._live: Live | None = None
        self._held: Holding | None = self._whole(first.tree(0))
        self.collect: Callable[[int, Tensor], None] = lambda _, __: None

    @property
    def live(self) -> Live:
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

    def update(self) -> None:
        """Apply the bound gradients to what is here: rows, and whole small parameters among them.

        In one thread: several would cut a CPU kernel's vectors elsewhere, for every number of rows. The first
        one is watched; raises JobRejected for an optimizer that needs more than rows.
        """
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        live = self.live
        watched = nullcontext() if self._is_watched else NoPartialSums()  # type: ignore[no-untyped-call]  # torch's
        numbers = no_readings("optimizer", live.sharded.parameters)
        try:
            with implicit_replication(), only_elements(), numbers, watched:
                live.learner.update()
        finally:
            torch.set_num_threads(num_threads)
        self._is_watched = True

    def complete(self, world: World) -> None:
        """Do nothing: the next forward gathers what it needs."""

    def settle(self, world: World, leaving: Collection[int] = ()) -> int:
        """Cut the state anew for a world whose ranks stand at one step, and move what has to move; return how
        many pieces of rows came here. With ranks that are leaving, which get none, it is not made ready to
        train.

        Raises Broken, having changed nothing, and StateLost if no rank has some of the rows any more.
        """
        staying = [rank for rank in range(world.size) if rank not in leaving]
        arrangement = arrange([world.hosts[rank] for rank in staying], self._copies)
        cuts = [Cut(arrangement.shards, arrangement.shards)] * world.size  # no rows
        for place, rank in enumerate(staying):
            cuts[rank] = arrangement.cut(place)
        held, num_taken = cut_anew(world, self._hold(), cuts, self._mould.sharded, self._device)
        if leaving:
            meet(world)
            if world.rank in staying:  # who leaves keeps what it had: one that stays may die just now
                self._held, self._live = held, None
            return num_taken
        sharded = self._pour(held, cuts[world.rank])
        with no_readings("optimizer", sharded.parameters):
            learner = self._build(sharded.model)
        learner.load_without_model(put_together(held, sharded.spread))
        mine = cuts[world.rank].index
        others = [rank for rank in range(world.size) if rank != world.rank]
        takers = {rank for rank in others if arrangement.source(rank, mine) == world.rank}
        givers = {
            arrangement.source(world.rank, shard): shard
            for shard in range(arrangement.shards)
            if shard != mine
        }
        lockstep = Lockstep(sharded.layers, self._waiting)
        meet(world)  # the rows of before are let go once all have their new ones, whoever dies meanwhile
        self._live = Live(world, arrangement, sharded, learner, cuts, frozenset(takers), givers, lockstep)
        self._held = None
        gc.collect()  # torch's models refer to themselves, and the old one's memory is wanted now
        return num_taken

    def replicas(self) -> list[Replicated]:
        """List what other ranks hold alike: the rows of one cut, and what has no rows."""
        held = self._hold()
        part = f"{held.cut.index} of {held.cut.shards}" if held.cut else ""
        rows = [Replicated(leaf_name(*leaf), tensor, part) for leaf, tensor in held.rows.items()]
        return [*held_alike(held.rest), *rows]

    def tree(self, step: int) -> dict[str, Any]:
        """Return what every rank holds alike of the state after `step` committed steps."""
        return {**self._hold().rest, "cursor": {"step": step}}

    def whole_tree(self, step: int) -> dict[str, Any]:
        """Return the whole state after `step` committed steps; all of it is here."""
        return self.shares(step)

    def shares(self, step: int) -> dict[str, Any]:
        """Return the whole state, of which each rank holds its rows."""
        mesh = self._saving_mesh()
        tree = put_together(self._hold(), lambda name, rows: self._as_saved(name, rows, mesh))
        model = {name: tree["model"][first] for name, first in self._mould.names.items()}
        return {**tree, "model": model, "cursor": {"step": step}}

    def load(self, tree: Mapping[str, Any]) -> int:
        """Take over a state: a whole one, or one of `tree`. Raises Mismatch if it is not this training's."""
        check_origin(tree, self._seed)
        self._held = Holding(None, {}, tree) if "sharded" in tree else self._whole(tree)
        self._live = None
        return int(tree["cursor"]["step"])

    def weights_sha256(self) -> str:
        """Hash the model; every rank of the world has to. Raises Broken."""
        live, names = self.live, self._mould.names

        def whole(name: str, tensor: Tensor) -> Tensor:
            first = names[name]
            parameters = live.sharded.parameters
            return self.whole(first, parameters[first]) if first in parameters else tensor

        return tensors_sha256(self._mould.tensors, whole)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Gather a tensor that lies as a parameter does. Raises Broken."""
        local = local_rows(tensor)
        if name not in self._mould.sharded:
            return local
        cut, shape = self.live.sharded.cut, self._mould.sharded[name]
        padded = local.new_zeros(cut.shards, -(-shape[0] // cut.shards), *shape[1:])
        padded[cut.index, : len(local)] = local
        self._gather(padded)
        return padded.flatten(0, 1)[: shape[0]]

    def exchange(self, send: Sequence[Tensor | None], receive: Sequence[Tensor | None]) -> None:
        """Swap tensors with the other ranks. Raises Broken."""
        with self._waiting():
            self.live.world.exchange(send, receive)

    def _gather_unit(self, unit: int, out: Tensor) -> None:
        """Gather a unit's parameters for its forward or backward."""
        self.live.lockstep.come_to(self.live.world, GATHER, unit)
        self._gather(out)

    def _gather(self, out: Tensor) -> None:
        """Fill in the parts of the other shards."""
        live, parts = self.live, out.view(self.live.sharded.cut.shards, -1)
        mine = parts[live.sharded.cut.index]
        ranks = range(live.world.size)
        self.exchange(
            [mine if rank in live.takers else None for rank in ranks],
            [parts[live.givers[rank]] if rank in live.givers else None for rank in ranks],
        )

    def _pour(self, held: Holding, cut: Cut) -> Sharded:
        """Make the model of what is held."""
        rows = {name: tensor for (name, key), tensor in held.rows.items() if not key}
        alike = {name: tensor.to(self._device) for name, tensor in held.rest["model"].items()}
        wires = Wires(self._gather_unit, self.collect)
        return self._mould.pour(cut, {**alike, **rows}, self._device, wires)

    def _hold(self) -> Holding:
        """Return what is here, as plain tensors."""
        if self._held is not None:
            return self._held
        live, tensors = self.live, self._mould.tensors
        buffers = {name: tensors[name] for name in self._mould.names.values()}
        tree = {**live.learner.tree_without_model(0), "model": {**buffers, **live.sharded.parameters}}
        return take_apart(tree, self._mould.sharded, live.sharded.cut)

    def _whole(self, tree: Mapping[str, Any]) -> Holding:
        """Return a whole state, as what a rank holds."""
        check_model(self._mould.tensors, tree["model"])
        model = {name: tree["model"][name] for name in self._mould.names.values()}
        return take_apart({**tree, "model": model}, self._mould.sharded, Cut(1, 0))

    def _saving_mesh(self) -> DeviceMesh | None:
        """Return how the shards lie on the ranks, as a mesh of (replicas x) shards; None if each is whole."""
        live = self.live
        order, shards = live.arrangement.order, live.arrangement.shards
        if shards == 1:
            return None
        teams = torch.tensor(order[: len(order) // shards * shards]).view(-1, shards)
        places = teams[0] if len(order) % shards or len(teams) == 1 else teams
        return DeviceMesh(self._device.type, places, _init_backend=False, _rank=live.world.rank)

    def _as_saved(self, name: str, rows: Tensor, mesh: DeviceMesh | None) -> Tensor:
        """Return rows as a part of a whole tensor; on a rank whose rows others write, as no part of it."""
        if mesh is None:
            return rows
        parameter, placements = self._mould.parameters[name], (Replicate(), Shard(0))[-mesh.ndim :]
        return DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
