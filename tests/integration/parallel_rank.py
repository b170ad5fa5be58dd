"""Worlds of parallel modules, one after the other: each restores from stores, saves, and trains on.

python -m tests.integration.parallel_rank ROOT LAYOUT:FROM,FROM[:TO] ...

Writes ROOT/<layout>-from-<from>.json: the losses of the next steps.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Checkpointer, OnRanks, Options
from tests.parallel_modules import (
    ALL_EXPERTS,
    ALL_LAYERS,
    NUM_LAYERS,
    WIDTH,
    WORDS,
    Net,
    loss_of,
    owner_of,
    through_stages,
)

NUM_MICRO, MICRO_SHAPE = 2, (2, 3)
NUM_BEFORE, NUM_NEXT = 2, 3
MOMENTS = ("exp_avg", "exp_avg_sq")
Ranks = tuple[int, ...]


def whole() -> nn.Module:
    return Net()


def data() -> nn.Module:
    return DistributedDataParallel(Net())


def shards() -> nn.Module:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    return model


def tensor() -> nn.Module:
    return _cut(Net(), init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)))


def tensor_shards() -> nn.Module:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = _cut(Net(), both["tensor"])
    fully_shard(model, mesh=both["shard"])
    return model


def pipeline() -> nn.Module:
    return Net(layers=[dist.get_rank()])


def experts() -> nn.Module:
    return Net(experts=[one for one in ALL_EXPERTS if owner_of(one, 2) == dist.get_rank()])


def _cut(model: nn.Module, mesh: Any) -> nn.Module:
    """Cut the perceptrons by columns and by rows."""
    plan = {f"layers.{one}.up": ColwiseParallel() for one in ALL_LAYERS}
    return parallelize_module(
        model, mesh, {**plan, **{f"layers.{one}.down": RowwiseParallel() for one in ALL_LAYERS}}
    )


def stage_of(name: str) -> Ranks:
    """Return the rank whose stage a parameter belongs to."""
    part, number, *_ = name.split(".")
    return (int(number) if part == "layers" else {"embed": 0, "head": NUM_LAYERS - 1}[part],)


def dealt_to(name: str) -> Ranks:
    """Return the rank that has an expert; all have everything else."""
    parts = name.split(".")
    return (owner_of(int(parts[3]), 2),) if "experts" in parts else (0, 1)


@dataclass(frozen=True)
class Layout:
    """How many ranks, what each of them builds, who computes which part of a batch, and who holds what."""

    size: int
    build: Callable[[], nn.Module]
    data_ranks: int = 1
    holders: Callable[[str], Ranks] | None = None


LAYOUTS: Mapping[str, Layout] = {
    "whole": Layout(1, whole),
    "data": Layout(2, data, data_ranks=2),
    "shards": Layout(2, shards, data_ranks=2),
    "tensor": Layout(2, tensor),
    "tensor-shards": Layout(4, tensor_shards, data_ranks=2),
    "pipeline": Layout(2, pipeline, holders=stage_of),
    "experts": Layout(2, experts, holders=dealt_to),
}


@dataclass
class Training:
    """What one rank trains with; nothing in it is right before it is restored, or `begin` is called."""

    layout: Layout
    model: nn.Module
    keys: dict[str, int] = field(default_factory=lambda: {"dropout": -1})
    cursor: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=0.3)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)

    def state(self) -> dict[str, Any]:
        """Return what is saved and restored; of what other ranks hold, its shape."""
        state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }
        if self.layout.holders is not None:
            state |= self._leaves(self.layout.holders)
        return {**state, "keys": self.keys}

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Take the plain values of a restored state over, and the hyperparameters of one by leaves."""
        self.keys = state["keys"]
        if self.layout.holders is not None:
            for key, value in state["optimizer"]["param_groups"][0].items():
                if key != "params":
                    self.optimizer.param_groups[0][key] = value

    def _leaves(self, holders: Callable[[str], Ranks]) -> dict[str, Any]:
        with torch.device("meta"):
            shapes = {name: tuple(one.shape) for name, one in Net().named_parameters()}
        own, states = dict(self.model.named_parameters()), self.optimizer.state
        for one in own.values():
            if not states[one]:
                states[one] = {"step": torch.tensor(-1.0), **{key: nans(one) for key in MOMENTS}}

        def leaf(name: str, key: str | None = None) -> OnRanks:
            one = own.get(name) if key is None or name not in own else states[own[name]][key]
            return OnRanks(one, torch.float32, () if key == "step" else shapes[name], holders(name))

        group = self.optimizer.state_dict()["param_groups"][0]
        return {
            "model": {name: leaf(name) for name in shapes},
            "optimizer": {
                "class": "AdamW",
                "state": {name: {key: leaf(name, key) for key in ("step", *MOMENTS)} for name in shapes},
                "param_groups": [{**group, "params": list(shapes)}],
            },
        }

    def step(self) -> float:
        """Train on the batch that the cursor names; return its loss."""
        numbers = range(NUM_MICRO)
        if self.layout.data_ranks > 1:  # the first axis of the mesh
            numbers = range(at := dist.get_rank() * self.layout.data_ranks // self.layout.size, at + 1)
        loss = self._pass(list(numbers))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.keys["dropout"] = self.keys["dropout"] * 5 % 1009
        self.cursor["sample"] += NUM_MICRO
        return loss

    def _pass(self, numbers: list[int]) -> float:
        if self.layout.holders is stage_of:
            return through_stages(self.model, [self._batch(one) for one in numbers])
        total = torch.zeros(())
        for number in numbers:
            words, mask = self._batch(number)
            loss = loss_of(self.model(words, mask), words) / len(numbers)
            loss.backward()
            total += loss.detach()
        if self.layout.data_ranks > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total.item()

    def _batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a part of the batch: words by the cursor, and dropout by the key."""
        words = torch.Generator().manual_seed(self.cursor["sample"] + number)
        dropped = torch.Generator().manual_seed(10 * self.keys["dropout"] + number)
        mask = torch.rand(*MICRO_SHAPE, WIDTH, generator=dropped) > 0.3
        return torch.randint(0, WORDS, MICRO_SHAPE, generator=words), mask.float()


def nans(like: torch.Tensor) -> torch.Tensor:
    """Return what no training can go on from."""
    return torch.full_like(like, float("nan"), requires_grad=False)


def begin() -> Training:
    """Return a training that has taken a few steps, and never was in a checkpoint."""
    torch.manual_seed(0)
    found = Training(LAYOUTS["whole"], Net(), {"dropout": 77}, {"epoch": 3, "sample": 500})
    for _ in range(NUM_BEFORE):
        found.step()
    return found


def restored(root: Path, name: str, source: str) -> Training:
    """Return a training that has come out of a checkpoint which another layout saved."""
    layout = LAYOUTS[name]
    training = Training(layout, layout.build())
    with torch.no_grad():
        for one in training.model.parameters():
            one.fill_(float("nan"))
    state = training.state()
    with Checkpointer(root / source, options=Options(directory=root / "keeper")) as checkpointer:
        found = checkpointer.restore(state)
    assert found is not None and found.step == NUM_BEFORE and not found.notes
    training.adopt(state)
    training.cursor = found.cursor  # type: ignore[assignment]
    return training


def save(root: Path, name: str, training: Training) -> None:
    """Save a training as a layout holds it."""
    options = Options(lease_s=0.5, directory=root / "keeper", arena_mib=4)
    with Checkpointer(root / name, options=options) as checkpointer:
        saving = checkpointer.save(NUM_BEFORE, training.state(), cursor=dict(training.cursor))
        assert saving is not None and saving.durable().result(60).step == NUM_BEFORE


def be_rank(root: Path, name: str, sources: list[str], *, rank: int, is_saved: bool) -> None:
    """Be one rank of a world: go on from every source."""
    torch.set_num_threads(1)
    meeting = FileStore(str(root / f"meeting-{name}-{'-'.join(sources)}"), LAYOUTS[name].size)
    dist.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=LAYOUTS[name].size, timeout=timedelta(seconds=60)
    )
    for source in sources:
        training = begin() if source == "nothing" else restored(root, name, source)
        if is_saved:
            save(root, name, training)
        losses = [training.step() for _ in range(NUM_NEXT)]
        (root / f"{name}-from-{source}-{rank}.json").write_text(json.dumps(losses))
    dist.barrier()
    os._exit(0)  # DDP's destructor may wait for a thread of gloo that waits for the interpreter's lock


def _children(root: Path, name: str, sources: list[str], *, is_saved: bool) -> Iterator[int]:
    for rank in range(LAYOUTS[name].size):
        if (pid := os.fork()) == 0:
            try:
                be_rank(root, name, sources, rank=rank, is_saved=is_saved)
            except BaseException:  # noqa: BLE001 -- the end of the process
                traceback.print_exc()
                os._exit(1)
        yield pid


def main(root: str, worlds: list[str]) -> None:
    """Run worlds; their ranks are forked here, because torch takes long to load."""
    for world in worlds:
        name, sources, *saved = world.split(":")
        children = list(_children(Path(root), name, sources.split(","), is_saved=bool(saved)))
        while children:
            pid, status = os.wait()
            children.remove(pid)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a rank of world {world} ended with {status}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
