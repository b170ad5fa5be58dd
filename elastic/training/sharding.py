"""A sharded optimizer: each rank keeps the state of some parameters, and updates only those (ZeRO, stage 1).

Parameters are dealt whole, so that every optimizer that treats them one by one works, and each has some
holders, which compute the same update: as many losses at once, less one, cost neither state nor a step.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import OnRanks
from elastic.control.sharding import Holders, deal_states, lost_states, moves
from elastic.errors import JobRejected
from elastic.training.carrying import placed
from elastic.training.exchange import gather_words, meet
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.ports import World
from elastic.training.replicas import Replicated, held_alike, leaf_name
from elastic.training.state import Learner, StateLost


class ShardedLearner:
    """A learner whose optimizer state is spread over the ranks of a world; the model is whole on all of them.

    Every parameter's state is on `copies` ranks, on different hosts where there are as many.
    """

    def __init__(self, learner: Learner, copies: int, device: torch.device) -> None:
        self._learner, self._copies, self._device = learner, copies, device
        self._names = list(learner.parameters)
        self._parameters = list(learner.parameters.values())
        self._mine = set(range(len(self._names)))
        self._holders: Holders = ()
        self._kinds: dict[str, dict[str, Any]] = {}
        self._num_updates = 0  # in the present world

    @property
    def model(self) -> nn.Module:
        """The model, whole once `complete` has returned."""
        return self._learner.model

    @property
    def is_whole(self) -> bool:
        """Whether all of the optimizer's state is here."""
        return len(self._mine) == len(self._names)

    def update(self) -> None:
        """Apply the bound gradients to the parameters whose state is here; the others are stale then.

        Raises JobRejected if the optimizer keeps what is no tensor of some.
        """
        for number, parameter in enumerate(self._parameters):
            if number not in self._mine:
                parameter.grad = None
        if self._learner.update():
            self._own_kinds()
        self._num_updates += 1

    def complete(self, world: World) -> None:
        """Give everybody's updated parameters to everybody. Raises Broken; nothing is lost then."""
        if self._num_updates == 1:  # a state is made in the first one, which is not always the first step
            self._learn_kinds(world)
        self._share_values(world)

    def settle(self, world: World, leaving: Collection[int] = ()) -> int:
        """Deal the state anew over a world whose ranks stand at one step, but for those that are leaving, and
        move what has to move; return how many parameters' state came here.

        Raises Broken, and StateLost if no rank has some of the state any more.
        """
        held = [set(each) for each in gather_words(world, sorted(self._mine))]
        if lost := lost_states(held, len(self._names)):
            raise StateLost(
                f"the optimizer's state of {len(lost)} of {len(self._names)} parameters "
                f"({self._names[lost[0]]}, ...) was on lost ranks only"
            )
        sizes = [parameter.numel() for parameter in self._parameters]
        holders = deal_states(sizes, held, world.hosts, self._copies, leaving=leaving)
        moved = moves(held, holders)
        for (sender, receiver), numbers in sorted(moved.items()):
            self._move(world, sender, receiver, numbers)
        meet(world)  # what was moved is let go here once it is there, whoever dies meanwhile
        kept = {each for each, ranks in enumerate(holders) if world.rank in ranks}
        for number in frozenset() if world.rank in leaving else self._mine - kept:  # who leaves needs no room
            self._learner.optimizer.state.pop(self._parameters[number], None)
            self._mine.discard(number)
        self._holders, self._num_updates = holders, 0
        self._learn_kinds(world)
        self._share_values(world)
        return sum(len(numbers) for (_, receiver), numbers in moved.items() if receiver == world.rank)

    def tree(self, step: int) -> dict[str, Any]:
        """Return what every rank holds alike of the state after `step` committed steps."""
        tree = self._learner.tree(step)
        return {**tree, "optimizer": {**tree["optimizer"], "state": {}}, "held": []}

    def replicas(self) -> list[Replicated]:
        """List what other ranks hold alike: values and state of a parameter on its holders, and the rest.

        A parameter's values on other ranks come from its first holder in every step: they have no say.
        """
        model, state = self._learner.model.state_dict(keep_vars=True), self._learner.optimizer.state
        dealt = set(map(id, self._parameters))
        others = {
            name: each.detach() if isinstance(each, Tensor) else each
            for name, each in model.items()
            if id(each) not in dealt
        }
        found = held_alike({**self.tree(0), "model": others})
        for number in sorted(self._mine):
            name, parameter = self._names[number], self._parameters[number]
            here = {"": parameter.detach(), **state.get(parameter, {})}
            found.extend(Replicated(leaf_name(name, key), tensor) for key, tensor in here.items())
        return found

    def weights_sha256(self) -> str:
        """Hash the model."""
        return self._learner.weights_sha256()

    def whole_tree(self, step: int) -> dict[str, Any]:
        """Return the whole state after `step` committed steps; all of it is here."""
        return self._learner.tree(step)

    def shares(self, step: int) -> dict[str, Any]:
        """Return the whole state, as far as it is here; what is elsewhere is named.

        Raises JobRejected if the optimizer's state is not what it was in the first step.
        """
        tree = self._learner.tree(step)
        here = tree["optimizer"]["state"]
        for name in (self._names[number] for number in self._mine):
            _check_kinds(name, here.get(name, {}), self._kinds[name])
        state = {
            name: {key: _leaf(kind, here.get(name, {}).get(key), ranks) for key, kind in kinds.items()}
            for name, ranks, kinds in zip(
                self._names, self._holders, map(self._kinds.__getitem__, self._names), strict=True
            )
            if kinds
        }
        return {**tree, "optimizer": {**tree["optimizer"], "state": state}}

    def load(self, tree: Any) -> int:
        """Take over a state: a whole one, or one of `tree`. Raises Mismatch if it is not this training's."""
        step = self._learner.load({key: value for key, value in tree.items() if key != "held"})
        self._mine = set(tree.get("held", range(len(self._names))))
        return step

    def _share_values(self, world: World) -> None:
        """Give everybody the values of each parameter that its first holder has."""
        if world.size == 1:
            return
        given = [
            [number for number, ranks in enumerate(self._holders) if ranks[0] == rank]
            for rank in range(world.size)
        ]
        length = max(sum(self._parameters[number].numel() for number in share) for share in given)
        mine = torch.zeros(length, device=self._device)
        everyones = torch.empty(world.size * length, device=self._device)
        for number, piece in self._placed(mine, given[world.rank]):
            piece.copy_(self._parameters[number].detach())
        world.all_gather(everyones, mine)
        with torch.no_grad():
            for row, share in zip(torch.split(everyones, length), given, strict=True):
                for number, piece in self._placed(row, share):
                    if number not in self._mine:
                        self._parameters[number].copy_(piece)

    def _move(self, world: World, sender: int, receiver: int, numbers: Sequence[int]) -> None:
        """Move state, and the parameters it belongs to: the receiver's are of the step before, perhaps."""
        states = self._learner.optimizer.state
        if world.rank == sender:
            given = [(self._parameters[number], states[self._parameters[number]]) for number in numbers]
            state = [[parameter.detach(), dict(state)] for parameter, state in given]
            hand_over(world, [receiver], Parcel(state, "self"), self._device)
        if world.rank == receiver:
            taken = accept(world, sender, self._device).state
            for number, (value, state) in zip(numbers, taken, strict=True):
                parameter = self._parameters[number]
                parameter.data.copy_(value)
                states[parameter] = placed(parameter, None, state)
                self._mine.add(number)

    def _learn_kinds(self, world: World) -> None:
        """Learn what each parameter's state is made of from those that hold it."""
        self._kinds = {}
        for told in gather_words(world, self._own_kinds()):
            self._kinds |= told

    def _own_kinds(self) -> dict[str, dict[str, Any]]:
        """Return what each parameter's state that is here is made of. Raises JobRejected for no tensors."""
        state = self._learner.optimizer.state
        return {
            self._names[number]: _kinds(self._names[number], state[self._parameters[number]])
            for number in self._mine
        }

    def _placed(self, row: Tensor, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield parameters with their places in a row."""
        at = 0
        for number in numbers:
            parameter = self._parameters[number]
            yield number, row[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()


def _kinds(name: str, state: dict[str, Any]) -> dict[str, Any]:
    if type(state) is not dict:
        raise JobRejected(
            f"the optimizer keeps the state of {name} in a {type(state).__name__}, not in a dict: it cannot "
            "be sharded; set training.optimizer_copies = 0"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise JobRejected(
                f"the optimizer keeps {key!r} of {name} as a {type(value).__name__}, not a tensor: "
                "it cannot be sharded; set training.optimizer_copies = 0"
            )
    return {key: [str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in state.items()}


def _check_kinds(name: str, state: dict[str, Any], known: dict[str, Any]) -> None:
    found = _kinds(name, state)
    if different := [key for key in found.keys() | known.keys() if found.get(key) != known.get(key)]:
        raise JobRejected(
            f"the optimizer's {min(different)!r} of {name} is not what it was after its first step, so that "
            "other ranks do not know of it: it cannot be sharded; set training.optimizer_copies = 0"
        )


def _leaf(kind: Any, tensor: Tensor | None, ranks: tuple[int, ...]) -> OnRanks:
    dtype, shape = kind
    return OnRanks(tensor, getattr(torch, dtype), tuple(shape), tuple(sorted(ranks)))
