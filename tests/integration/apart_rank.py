"""A rank that restores what two saved, while something is amiss with one of them, and writes what it met."""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpoint import Checkpointer, OnRanks, Options
from checkpoint.checkpointer import restoring

SHAPE = (1024, 1024)
SMALL = (3, 4)


def main(root: Path, rank: int, story: str) -> None:
    """Play one of two ranks of a story; a rank that is left waiting meets the group's timeout."""
    meeting, timeout = f"file://{root}/meeting", timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timeout)
    met: Any
    try:
        met = STORIES[story](root, rank)
    except Exception as error:  # noqa: BLE001 -- it is what the test asks for
        met = f"{type(error).__name__}: {error}"
    (root / f"met{rank}").write_text(json.dumps(met))


def opened(root: Path, name: str = "store") -> Checkpointer:
    kept = root / f"keeper-{name}"
    kept.mkdir(mode=0o700, exist_ok=True)
    return Checkpointer(str(root / name), options=Options(directory=kept, lease_s=0.3))


def columns(root: Path, rank: int) -> Any:
    """What is filled lies column by column in memory, as transposed weights do."""
    mesh = init_device_mesh("cpu", (2,))
    own = torch.zeros(SHAPE[1] // 2, SHAPE[0]).t()
    state = {"w": DTensor.from_local(own, mesh, [Shard(1)], run_check=False)}
    with opened(root) as checkpointer:
        restored = checkpointer.restore(state)
    torch.save(own.contiguous(), root / f"half{rank}")
    return restored and restored.step


def expanded(root: Path, rank: int) -> Any:
    """One rank's tensor has a row's memory for all of its rows."""
    target = torch.zeros(SHAPE) if rank == 0 else torch.zeros(1, SHAPE[1]).expand(SHAPE)
    with opened(root) as checkpointer:
        checkpointer.restore({"w": target})


def exhausted(root: Path, rank: int) -> Any:
    """One rank has no memory left for its plan."""

    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    if rank == 1:
        vars(restoring)["plan_refill"] = fail
    with opened(root) as checkpointer:
        checkpointer.restore({"w": torch.zeros(SHAPE)})


def elsewhere(root: Path, rank: int) -> Any:
    """Each rank has a store of its own, of one run and step, and of other content."""
    mesh = init_device_mesh("cpu", (2,))
    with opened(root, "store" if rank == 0 else "other") as checkpointer:
        checkpointer.restore({"w": distribute_tensor(torch.zeros(SHAPE), mesh, [Shard(0)])})


def tied(root: Path, rank: int) -> Any:
    """One rank alone holds two names of one tensor; the other cannot know that they are one."""

    def state_of(tensor: torch.Tensor) -> dict[str, OnRanks]:
        held = tensor if rank == 0 else None
        return {name: OnRanks(held, torch.float32, SMALL, (0,)) for name in ("embedding", "head")}

    with opened(root, "pipeline") as checkpointer:
        checkpointer.save(1, state_of(torch.arange(12.0).reshape(SMALL)))
        checkpointer.wait()
        dist.barrier()
    into = torch.zeros(SMALL)
    with opened(root, "pipeline") as checkpointer:
        checkpointer.restore(state_of(into))
    return float(into.sum())


STORIES: dict[str, Callable[[Path, int], Any]] = {
    one.__name__: one for one in (columns, expanded, exhausted, elsewhere, tied)
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive its groups: now and then one of them aborts an interpreter that ends
