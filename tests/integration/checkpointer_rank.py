"""Worlds, one after the other, that train a replicated and a sharded model: restore, train, save, tell."""

import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from checkpoint.checkpointer import Checkpointer, Options, Rng
from checkpoint.engine.per_rank import PerRank


class Block(nn.Module):
    """Uneven sizes, a tied weight and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 7)
        self.inner = nn.Linear(7, 13)
        self.frozen = nn.Linear(13, 7).requires_grad_(requires_grad=False)
        self.head = nn.Linear(7, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.frozen(self.inner(self.embed(tokens)).relu()))
        return found


def learner(model: nn.Module) -> dict[str, Any]:
    """Put a model together with what trains it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
    }


def make(size: int) -> dict[str, Any]:
    """Make the same state on every rank: a replicated and a sharded model, the latter twice if it can."""
    torch.manual_seed(0)
    replicated, sharded = Block(), Block()
    shape = (2, size // 2) if size % 2 == 0 else (size,)
    names = ("replica", "shard")[-len(shape) :]
    fully_shard(sharded, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    torch.manual_seed(dist.get_rank())
    return {
        "replicated": learner(DistributedDataParallel(replicated)),
        "sharded": learner(sharded),
        "rng": Rng(),
        "own": PerRank({"rank": dist.get_rank()}),
        "epoch": 0,
    }


def train(state: dict[str, Any], step: int) -> None:
    """Make one step, on other data on every rank."""
    for name in ("replicated", "sharded"):
        chosen = torch.Generator().manual_seed(100 * step + dist.get_rank())
        state[name]["model"](torch.randint(0, 23, (5,), generator=chosen)).square().mean().backward()
        state[name]["optimizer"].step()
        state[name]["scheduler"].step()
        state[name]["optimizer"].zero_grad()
    state["epoch"] = step


def full(state: dict[str, Any]) -> dict[str, Any]:
    """Gather all tensors in full, and copy them."""
    found: dict[str, Any] = {"epoch": state["epoch"]}
    for name in ("replicated", "sharded"):
        model, optimizer = state[name]["model"], state[name]["optimizer"]
        for key, value in model.state_dict().items():
            found[f"{name}/{key.removeprefix('module.')}"] = _full(value)
        for number, values in optimizer.state_dict()["state"].items():
            found |= {f"{name}/{number}/{key}": _full(value) for key, value in values.items()}
        found[f"{name}/lr"] = optimizer.param_groups[0]["lr"]
        found[f"{name}/initial_lr"] = optimizer.param_groups[0]["initial_lr"]
        found[f"{name}/scheduler"] = state[name]["scheduler"].state_dict()
    return found


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def be_rank(root: Path, rank: int, size: int, first: int, last: int) -> None:
    """Be one rank: restore what step `first` left, train to step `last`, and write down both states."""
    meeting = FileStore(str(root / f"meeting{first}"), size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    state = make(size)
    options = Options(lease_s=1.0, directory=root / "keeper", arena_mib=8)
    with Checkpointer(
        str(root / "store"), run="worlds", every=last, memory=1, options=options
    ) as checkpointer:
        restored = checkpointer.restore(state)
        assert (restored.step if restored else 0) == first
        torch.save(full(state), root / f"at{first}-size{size}-rank{rank}")
        saving = None
        for step in range(first + 1, last + 1):
            train(state, step)
            saving = checkpointer.save(step, state)
        assert saving is not None and saving.durable().result(60).step == last
        told = "" if restored is None else "\n".join(restored.notes)
        (root / f"notes{first}-{rank}").write_text(told)
        (root / f"bytes{first}-{rank}").write_text(str(restored.report.num_bytes if restored else 0))
        torch.save(full(state), root / f"at{last}-from{first}-rank{rank}")
        dist.barrier()
    os._exit(0)  # DDP's destructor may wait for a thread of gloo that waits for the interpreter's lock


def disagree(root: Path, rank: int, size: int) -> None:
    """Restore from stores of one's own, of which only one has a newest checkpoint that is whole."""
    meeting = FileStore(str(root / "meeting"), size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (size,))
    sharded = distribute_tensor(torch.zeros(7, 3), mesh, [Shard(0)])
    state: dict[str, Any] = {"plain": torch.zeros(5), "sharded": sharded}
    url, options = str(root / f"store{rank}"), Options(directory=root / "keeper")
    with Checkpointer(url, options=options) as checkpointer:
        restored = checkpointer.restore(state)
        assert restored is not None and [one.step for one in restored.report.fallbacks] == [2]
        why = restored.report.fallbacks[0].why
        assert restored.step == 1 and "Corrupt" in why and "rank 1" in why
    assert (state["plain"] == 1).all() and (sharded.full_tensor() == 1).all()
    dist.destroy_process_group()


def main(directory: str, worlds: list[str]) -> None:
    """Run worlds "size:first:last"; their ranks are forked here, because torch takes long to load."""
    for world in worlds:
        size, *steps = map(int, world.split(":"))
        children = []
        for rank in range(size):
            if (pid := os.fork()) == 0:
                try:
                    root = Path(directory)
                    be_rank(root, rank, size, *steps) if steps else disagree(root, rank, size)
                    os._exit(0)
                except BaseException:  # noqa: BLE001 -- the end of the process
                    traceback.print_exc()
                    os._exit(1)
            children.append(pid)
        while children:
            pid, status = os.wait()
            children.remove(pid)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a rank of world {world} ended with {status}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # as in apart_rank.py
