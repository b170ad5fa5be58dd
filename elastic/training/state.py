"""What a training step changes: model, optimizer and schedule; live, and as a plain nested state."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoint import Mismatch, flatten_state
from elastic.errors import JobRejected
from elastic.training.blame import blaming_the_job
from elastic.training.carrying import (
    EXTRA,
    check_modules,
    count_entries,
    give_optimizer,
    groups_of,
    take_optimizer,
    take_schedule,
)
from elastic.training.containers import newcomer_of
from elastic.training.job import Job
from elastic.training.ports import World
from elastic.training.randomness import INITIAL, keyed, seed_for
from elastic.training.replicas import Replicated, held_alike

_NAMED = 3


class StateLost(Exception):
    """No rank of a world has some of the state: it has to come from a checkpoint."""


def first_model(job: Job, settings: Any, seed: int) -> nn.Module:
    """Make a job's model on the CPU, initialised from the seed."""
    with keyed(seed_for(seed, INITIAL, INITIAL), torch.device("cpu")):
        return job.model(settings).train()


class Learner:
    """A model with its optimizer and schedule.

    As a state it is `{"model": {name: tensor}, "optimizer": {"state": {parameter: {...}}, "groups": [...]},
    "schedule": ..., "kinds": {path: ...}, "cursor": {"step": n}, "seed": seed}`: names, never positions.
    """

    def __init__(self, job: Job, model: nn.Module, seed: int, num_steps: int) -> None:
        self.seed = seed
        self.model = model
        self.optimizer: Optimizer = job.optimizer(model)
        schedule = getattr(job, "schedule", None)
        self._schedule = schedule(self.optimizer, num_steps) if schedule is not None else None
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.parameters: dict[str, nn.Parameter] = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._names:
                    raise JobRejected(
                        "the job's optimizer has a parameter that is not the model's; make it of "
                        "model.parameters()"
                    )
                self.parameters[self._names[id(parameter)]] = parameter
        check_modules(model)
        parts = {"optimizer": self.optimizer, "schedule": self._schedule}
        self._newcomer = newcomer_of(self._parts(), parts)
        self._num_taken = -1

    @property
    def is_whole(self) -> bool:
        """Whether all of the state is here."""
        return True

    def settle(self, world: World, leaving: Collection[int] = ()) -> int:  # noqa: ARG002  (who holds shares asks it)
        """Return that nothing had to come from other ranks: every rank holds everything."""
        return 0

    def complete(self, world: World) -> None:
        """Do nothing: every rank of the world has updated everything."""

    def update(self) -> bool:
        """Apply the bound gradients: one optimizer step, one schedule step; return whether the optimizer
        keeps more than before, or less.

        Raises JobRejected if what came with it could not be taken.
        """
        self.optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        num_entries = count_entries(self.optimizer)
        is_other = num_entries != self._num_taken
        if is_other:
            self._newcomer.take(self._parts())
            self._num_taken = num_entries
        return is_other

    def replicas(self) -> list[Replicated]:
        """List what other ranks hold alike: here everything."""
        return held_alike(self.tree(0))

    def tree(self, step: int) -> dict[str, Any]:
        """Return the state after `step` committed steps. Its tensors are the live ones."""
        with blaming_the_job(step):
            return {"model": dict(self.model.state_dict()), **self.tree_without_model(step)}

    def tree_without_model(self, step: int) -> dict[str, Any]:
        """Return the same without the model. Raises JobRejected for what nobody could come to exactly."""
        with blaming_the_job(step):
            return {
                **self._newcomer.take(self._parts()),
                "cursor": {"step": step},
                "seed": self.seed,
            }

    def whole_tree(self, step: int) -> dict[str, Any]:
        """Return the same, as every learner does that is whole."""
        return self.tree(step)

    def weights_sha256(self) -> str:
        """Hash the model."""
        return weights_sha256(self.model)

    def shares(self, step: int) -> dict[str, Any]:
        """Return the same, to be saved: every rank gives all of it."""
        return self.tree(step)

    def load(self, tree: Mapping[str, Any]) -> int:
        """Take over a state, whose tensors are then ours; return its step.

        Raises Mismatch, having changed nothing, if it is not this training's.
        """
        check_origin(tree, self.seed)
        check_model(self.model.state_dict(), tree["model"])
        self._check_kind(tree)
        self._made(tree)
        with blaming_the_job(int(tree["cursor"]["step"])):
            self.model.load_state_dict(dict(tree["model"]))
        return self.load_without_model(tree)

    def load_without_model(self, tree: Mapping[str, Any]) -> int:
        """Take over all but the model. Raises Mismatch, having changed nothing, for another training's."""
        self._check_kind(tree)
        step = int(tree["cursor"]["step"])
        made = self._made(tree)
        with blaming_the_job(step):
            give_optimizer(self.optimizer, made["optimizer"], tree["optimizer"], self.parameters)
            if self._schedule is not None:
                self._schedule.load_state_dict(made["schedule"])
        return step

    def _parts(self) -> dict[str, Any]:
        """Return what is here beside the model, live."""
        return {
            "optimizer": take_optimizer(self.optimizer, self._names),
            "schedule": take_schedule(self._schedule),
        }

    def _made(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        return self._newcomer.make({key: tree[key] for key in ("optimizer", "schedule")}, tree.get("kinds"))

    def _check_kind(self, tree: Mapping[str, Any]) -> None:
        ours = [group["params"] for group in groups_of(self.optimizer, self._names)]
        theirs = [list(group["params"]) for group in tree["optimizer"]["groups"]]
        if ours != theirs:
            raise Mismatch(
                "the checkpoint's optimizer groups other parameters than the job's: resume with the job "
                "that wrote it"
            )
        if (tree["schedule"] is None) != (self._schedule is None):
            raise Mismatch(
                "only one of checkpoint and job has a learning-rate schedule: resume with the job that "
                "wrote it"
            )


def check_origin(tree: Mapping[str, Any], seed: int) -> None:
    """Raise Mismatch unless a state is one of a training with this seed."""
    if missing := sorted({"model", "optimizer", "schedule", "cursor", "seed"} - set(tree)):
        raise Mismatch(f"the checkpoint is not one of a training: it has no {missing[0]!r}")
    if tree["seed"] != seed:
        raise Mismatch(
            f"the checkpoint was trained with seed {tree['seed']}, this run has {seed}: set "
            f"training.seed = {tree['seed']}"
        )


def load_model(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Copy a state's tensors into the model. Raises Mismatch if they are another model's."""
    check_model(model.state_dict(), tensors)
    model.load_state_dict(dict(tensors))


def check_model(state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise Mismatch, naming the first differences, unless names, shapes and dtypes are this state's."""
    ours = {name: _kind(name, value) for name, value in state.items()}
    theirs = {name: _kind(name, value) for name, value in tensors.items()}
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        named = "; ".join(
            f"{name}: {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here"
            for name in different[:_NAMED]
        )
        raise Mismatch(
            f"a checkpoint of another model: {len(different)} tensors differ ({named}); "
            "resume with the job and the settings that wrote it"
        )


def weights_sha256(model: nn.Module) -> str:
    """Hash a model's state: names in order, dtypes, shapes, bytes. What two names share counts once."""
    return tensors_sha256(model.state_dict(), lambda _, tensor: tensor)


def tensors_sha256(state: Mapping[str, Any], whole: Callable[[str, Tensor], Tensor]) -> str:
    """Hash a model's state; `whole` returns the tensor of a name with all its values."""
    digest = hashlib.sha256()
    extras = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    plain, inside = flatten_state(extras)
    if extras:
        digest.update(json.dumps(plain, sort_keys=True).encode())
    tensors = {name: value for name, value in state.items() if name not in extras}
    seen = set()
    for name, shared in sorted({**tensors, **inside}.items()):
        has_memory = shared.numel() and not shared.is_meta
        identity = (shared.data_ptr(), shared.shape, shared.stride()) if has_memory else id(shared)
        if identity not in seen:
            seen.add(identity)
            tensor = whole(name, shared)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _kind(name: str, value: Any) -> str:
    if name.rpartition(".")[2] == EXTRA:
        return "extra state"  # whose shapes may change
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
