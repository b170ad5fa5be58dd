"""Back into what a training loop has: which boxes of a checkpoint it wants, and what it does with them.

Parameters are filled where they are, in whatever layout they have now. What a checkpoint holds and nobody
asks for is left alone; what is asked for and not there is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoint.checkpointer.asides import Aside, Place, put_all, set_aside
from checkpoint.checkpointer.objects import (
    Kind,
    class_of,
    kind_of,
    module_state,
    parameter_names,
    state_of_rank,
    walk,
)
from checkpoint.checkpointer.optimizers import plan_optimizer
from checkpoint.checkpointer.sharing import Request
from checkpoint.engine.leaves import Holders, describe, everyone, identity_of, own_tensors, whole_on
from checkpoint.engine.likeness import like, rebuilt
from checkpoint.engine.on_ranks import OnRanks
from checkpoint.engine.per_rank import PerRank, per_rank_values
from checkpoint.engine.targets import Wanted, check_apart
from checkpoint.engine.tensors import identity, torch_dtype, unflatten_state
from checkpoint.errors import Mismatch
from checkpoint.format.layout import Box
from checkpoint.format.manifest import Manifest, TensorRecord
from checkpoint.format.tree import Json, leaf_names

_MAX_NAMED = 5
Later = Callable[[], Any]  # to be called once everything wanted is there: returns what a thing is now


@dataclass(slots=True)
class Refill:
    """One restore of one checkpoint, for one rank: what to read, and what is to be told of it.

    Make it with `plan_refill`; have the `requests` filled; then call `settle`, and `finish`.
    """

    manifest: Manifest
    place: tuple[int, int]
    requests: list[Request] = field(default_factory=list)
    per_rank: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finish: Later = lambda: None
    records: dict[str, TensorRecord] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    filled: dict[Any, str] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    asides: list[Aside] = field(default_factory=list)

    @property
    def is_on_device(self) -> bool:
        """Whether any of what is to be filled lies where no file is read to."""
        targets = (wanted.target for one in self.requests for wanted in one.wanted)
        return any(isinstance(one, torch.Tensor) and one.device.type != "cpu" for one in targets)

    def tensor(self, live: torch.Tensor | OnRanks, node: Json, path: str) -> Later:
        """Fill a tensor where it is: this rank's part of it."""
        record = self.record(node, path)
        leaf = describe(path, live, *self.place)
        if (leaf.spec.dtype, leaf.spec.shape) != (record.dtype, record.shape):
            raise Mismatch(
                f"{path} is {leaf.spec.dtype}{list(leaf.spec.shape)} here and {record.dtype}"
                f"{list(record.shape)} in the checkpoint of step {self.manifest.step}: "
                "use the settings it was saved with"
            )
        own = own_tensors([path], [live])[0].detach()
        holds = not isinstance(live, OnRanks) or live.tensor is not None
        check_apart(path, own)
        key = identity(own), leaf.spec.shape, leaf.spread
        if holds and key not in self.filled:
            self.places.append(Place(path, own, len(self.requests)))
        if holds and self._is_filled(key, record, path) and not isinstance(live, OnRanks):
            return lambda: live  # other frameworks store it once for each name; who lacks it cannot know that
        parts = leaf.parts(self.place[0])
        targets = {part.box: own[tuple(map(slice, part.local.start, part.local.stop))] for part in parts}
        self.ask(record, leaf.holders(self.place[1]), targets)
        return lambda: live

    def _is_filled(self, key: Any, record: TensorRecord, path: str) -> bool:
        """Whether the same memory is filled already, from a tensor of equal content. Raises Mismatch."""
        before = self.filled.setdefault(key, record.name)
        if before == record.name:
            return False
        if self.records[before].fingerprint != record.fingerprint:
            raise Mismatch(
                f"{path} is one tensor here (tied weights) and two in the checkpoint, "
                f"{before!r} and {record.name!r}, whose contents differ"
            )
        return True

    def settle(self) -> None:
        """Fill the tensors that share memory. Raises Mismatch if they cannot all hold what is theirs."""
        put_all(self.asides)

    def value(self, node: Json, path: str) -> Later:
        """Read whatever there is at a place of the checkpoint, as plain data and new tensors on the CPU."""
        tensors = {name: self.fresh(name, path) for name in dict.fromkeys(leaf_names(node))}
        return lambda: unflatten_state(node, tensors)

    def fresh(self, name: str, path: str) -> torch.Tensor:
        """Return a new tensor on the CPU that will hold all of a stored one."""
        record = self.record({"$": "tensor", "name": name}, path)
        tensor = torch.empty(record.shape, dtype=torch_dtype(record.dtype))
        whole = whole_on(record.shape, everyone(self.place[1]))
        self.ask(record, whole, dict.fromkeys(whole, tensor))
        return tensor

    def ask(self, record: TensorRecord, holders: Holders, targets: Mapping[Box, torch.Tensor]) -> None:
        """Ask for boxes that some ranks want; `targets` are what those that are wanted here are to fill."""
        wanted = [
            Wanted(record.name, record.dtype, record.shape, box, target)
            for box, target in targets.items()
            if not box.is_empty
        ]
        self.requests.append(Request(record.name, holders, tuple(wanted)))

    def record(self, node: Json, path: str) -> TensorRecord:
        """Return what the manifest says of the tensor that a node of the skeleton refers to."""
        match node:
            case {"$": "tensor", "name": str(name)}:
                return self.records[name]
        raise Mismatch(
            f"{path or 'the state'} is a tensor here, and none in the checkpoint of step {self.manifest.step}"
        )


def check_run(manifest: Manifest, run: str) -> None:
    """Raise Mismatch, naming both, if a checkpoint is another run's: its weights would load as well."""
    if manifest.run != run:
        raise Mismatch(
            f"the checkpoint of step {manifest.step} is of run {manifest.run!r}, and this is run {run!r}: "
            f"continue the other with Checkpointer(url, run={manifest.run!r}), give this one a store of its "
            f"own, or say restore(state, run={manifest.run!r}) if the other's state is meant"
        )


def plan_refill(state: Any, manifest: Manifest, place: tuple[int, int]) -> Refill:
    """Decide what to read for a state from a checkpoint; `place` is (rank, size).

    Raises Mismatch, naming what differs, if the checkpoint does not hold what is asked for.
    """
    refill = Refill(manifest, place, records={record.name: record for record in manifest.tensors})
    refill.names = parameter_names(state)
    refill.finish = _node(refill, state, manifest.skeleton, "")
    refill.requests, refill.asides = set_aside(refill.requests, refill.places)
    return refill


def _node(refill: Refill, live: Any, node: Json, path: str) -> Later:
    match kind_of(live):
        case Kind.TENSOR:
            return refill.tensor(live, node, path)
        case Kind.MODULE:
            return _module(refill, live, node, path)
        case Kind.OPTIMIZER:
            return _optimizer(refill, live, node, path)
        case Kind.PER_RANK:
            return _per_rank(refill, live, node, path)
        case Kind.STATEFUL:
            return _stateful(refill, live, node, path)
        case Kind.DICT if not path or _holds_things(live):
            return _dict(refill, live, node, path)
        case Kind.LIST | Kind.TUPLE if _holds_things(live):
            return _sequence(refill, live, node, path)
        case _:
            later = refill.value(node, path)
            return lambda: like(live, later())


def _stateful(refill: Refill, live: Any, node: Json, path: str) -> Later:
    """Load a thing's state; a scheduler's with the containers that it has (its milestones are a Counter)."""
    later = refill.value(node, path)

    def load() -> Any:
        state = later()
        live.load_state_dict(like(live.state_dict(), state) if isinstance(live, LRScheduler) else state)
        return live

    return load


def _dict(refill: Refill, live: dict[Any, Any], node: Json, path: str) -> Later:
    stored = entries(node, path)
    _check_names(refill, path, set(live) - set(stored), set())
    laters = {
        key: _node(refill, item, stored[key], f"{path}/{key}" if path else str(key))
        for key, item in live.items()
    }

    def later() -> dict[Any, Any]:
        for key, one in laters.items():
            live[key] = one()
        return live

    return later


def _sequence(refill: Refill, live: Any, node: Json, path: str) -> Later:
    match node:
        case list(items) | {"$": "tuple", "items": list(items)} if len(items) == len(live):
            laters = [
                _node(refill, item, stored, f"{path}/{number}")
                for number, (item, stored) in enumerate(zip(live, items, strict=True))
            ]
            return lambda: rebuilt(live, (one() for one in laters))
    raise Mismatch(f"{path or 'the state'} has {len(live)} items here, and another number in the checkpoint")


def _module(refill: Refill, module: nn.Module, node: Json, path: str) -> Later:
    state, stored = module_state(module, path), entries(node, path)
    state = _without_other_names(state, stored)
    _check_names(refill, path, set(state) - set(stored), set(stored) - set(state))
    extras: list[tuple[nn.Module, Later]] = []
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        if last == "_extra_state":
            extras.append((module.get_submodule(owner), refill.value(stored[name], f"{path}/{name}")))
        else:
            refill.tensor(value, stored[name], f"{path}/{name}")

    def later() -> nn.Module:
        for owner, extra in extras:
            owner.set_extra_state(extra())
        return module

    return later


def _without_other_names(state: Mapping[str, Any], stored: Mapping[Any, Json]) -> dict[str, Any]:
    """Leave out names that are not stored of tensors that are, by another: a tied weight may be kept once."""
    if set(state) <= set(stored):
        return dict(state)
    tensors = {name: identity_of(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    there = {one for name, one in tensors.items() if name in stored}
    return {name: value for name, value in state.items() if name in stored or tensors.get(name) not in there}


def _optimizer(refill: Refill, optimizer: Optimizer, node: Json, path: str) -> Later:
    stored = entries(node, path)
    _check_names(refill, path, {"state", "param_groups"} - set(stored), set())
    if (saved := stored.get("class", class_of(optimizer))) != class_of(optimizer):
        raise Mismatch(
            f"{path}: the checkpoint has the state of {saved} and {class_of(optimizer)} is here: "
            "use the optimizer it was saved with, or leave it out of what is restored"
        )
    later = plan_optimizer(refill, optimizer, stored, path)
    return lambda: (later(), optimizer)[1]


def _per_rank(refill: Refill, live: Any, node: Json, path: str) -> Later:
    """Give a rank back what was its own, if there are as many ranks as there were."""
    rows = refill.fresh(refill.record(node, path).name, path)
    rank, size = refill.place

    def later() -> Any:
        values = refill.per_rank[path] = tuple(per_rank_values(rows))
        if len(values) != size:
            refill.notes.append(
                f"{path} was saved by {len(values)} ranks, each its own, and {size} are here: left as it is; "
                f"deal anew what Restoration.per_rank[{path!r}] has of all of them"
            )
        elif not isinstance(live, PerRank):
            state_of_rank(live)[1](values[rank])
        elif kind_of(live.value) is Kind.STATEFUL or kind_of(live.value) is Kind.PER_RANK:
            state_of_rank(live.value)[1](values[rank])
        else:
            return PerRank(values[rank], live.max_bytes)
        return live

    return later


def entries(node: Json, path: str) -> Mapping[Any, Json]:
    """Return the items of a stored dict. Raises Mismatch if it is none."""
    match node:
        case {"$": "dict", "items": list(items)}:
            pairs = [pair for pair in items if isinstance(pair, list)]
            return {unflatten_state(key, {}): item for key, item in pairs}
        case dict() if "$" not in node:
            return node
    raise Mismatch(f"{path or 'the state'} has parts here, and none in the checkpoint")


def _check_names(refill: Refill, path: str, missing: set[Any], unexpected: set[Any]) -> None:
    if not missing and not unexpected:
        return
    told = [
        f"{what}: {_listed(names)}"
        for what, names in (("absent", missing), ("unknown here", unexpected))
        if names
    ]
    raise Mismatch(
        f"the checkpoint of step {refill.manifest.step} of run {refill.manifest.run!r} does not fit "
        f"{path or 'the state'}; "
        f"{'; '.join(told)}. Use the model it was saved with"
    )


def _listed(names: set[Any]) -> str:
    some = sorted(map(str, names))
    return ", ".join(some[:_MAX_NAMED]) + (
        f" and {len(some) - _MAX_NAMED} more" if len(some) > _MAX_NAMED else ""
    )


def _holds_things(value: Any) -> bool:
    return any(True for _ in walk(value))
