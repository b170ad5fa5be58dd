"""Ranks that shard a model in every way torch knows, save it with torch's own tools, and load what we wrote.

python -m tests.integration.dcp_rank ROOT save 4      ROOT/<layout>, and ROOT/<layout>.pt: what it holds
python -m tests.integration.dcp_rank ROOT load 2      ROOT/ours into FSDP2, compared with ROOT/fsdp2.pt
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel


class Block(nn.Module):
    """Sizes that no number of ranks divides, a buffer, and a weight in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("seen", torch.tensor([3, 5]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        found: torch.Tensor = self.norm(hidden + self.down(self.up(hidden).relu()))
        return found


def mesh(*shape: int) -> DeviceMesh:
    """Lay the ranks out."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def tensor_parallel(model: nn.Module, over: DeviceMesh) -> nn.Module:
    """Cut the two linear layers by columns and by rows."""
    return parallelize_module(model, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp2(model: nn.Module) -> nn.Module:
    """Shard every parameter over all ranks."""
    fully_shard(model, mesh=mesh(dist.get_world_size()))
    return model


def hsdp(model: nn.Module) -> nn.Module:
    """Two replicas of two shards."""
    fully_shard(model, mesh=mesh(2, 2))
    return model


def tensor_and_data(model: nn.Module) -> nn.Module:
    """Two tensor ranks, sharded over two data ranks."""
    both = mesh(2, 2)
    tensor_parallel(model, both["b"])
    fully_shard(model, mesh=both["a"])
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    """The older FSDP, which flattens and concatenates parameters."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


LAYOUTS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tensor": lambda model: tensor_parallel(model, mesh(dist.get_world_size())),
    "tensor-data": tensor_and_data,
    "fsdp1": fsdp1,
    "ddp": DistributedDataParallel,
}


def train(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that has taken a few steps."""
    torch.manual_seed(0)
    model = LAYOUTS[layout](Block())
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}])
    for step in range(2):
        optimizer.zero_grad()
        tokens = torch.arange(8).reshape(2, 4) + step
        model(tokens).square().sum().backward()
        optimizer.step()
    return model, optimizer


def full(state: Any) -> Any:
    """Return a state with whole tensors."""
    match state:
        case dict():
            return {key: full(item) for key, item in state.items()}
        case torch.Tensor():
            return state.full_tensor() if hasattr(state, "full_tensor") else state
    return state


def save(root: Path) -> None:
    """Save every layout as torch does, and what it holds: whole, by names."""
    for layout in LAYOUTS:
        model, optimizer = train(layout)
        weights, states = get_state_dict(model, optimizer)
        cursor = {"epoch": 2, "seen": [1, 2, 3]}
        dcp_save({"model": weights, "optim": states, "cursor": cursor}, checkpoint_id=root / layout)
        options = StateDictOptions(full_state_dict=True)
        weights, states = get_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save(full({"model": weights, "optim": states}), root / f"{layout}.pt")


def load(root: Path) -> None:
    """Load what we wrote into FSDP2 over these ranks, take a step, and compare with what was saved."""
    model, optimizer = train("fsdp2")
    weights, states = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": states, "cursor": {"epoch": 0, "seen": [0]}}
    dcp_load(state, checkpoint_id=root / "ours")
    assert state["cursor"] == {"epoch": 2, "seen": [1, 2, 3]}
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    weights, states = get_state_dict(model, optimizer)
    saved = torch.load(root / "fsdp2.pt", weights_only=True)
    same({"model": full(weights), "optim": full(states)}, saved, "state")
    optimizer.step()


def same(one: Any, other: Any, where: str) -> None:
    """See that two states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{where}: {one.keys() ^ other.keys()}"
        for key, item in one.items():
            same(item, other[key], f"{where}.{key}")
    else:
        assert one == other, where


def rank(number: int, size: int, root: str, verb: str) -> None:
    """Be one rank of a world."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = FileStore(str(Path(root) / f"rendezvous-{verb}"), size)
    dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=timedelta(seconds=60))
    try:
        {"save": save, "load": load}[verb](Path(root))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # DDP's destructor may wait for a thread of gloo that waits for the interpreter's lock


if __name__ == "__main__":
    start_processes(
        rank, args=(int(sys.argv[3]), sys.argv[1], sys.argv[2]), nprocs=int(sys.argv[3]), start_method="fork"
    )
