"""A rank that restores halves of rows of what one process saved, as another may too, and tells how."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from checkpoint import Checkpointer, Options
from checkpoint.engine.straight import Straight

SHAPE = (1024, 1024)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: Path, rank: int, story: str) -> None:
    """Restore; in one story the second rank dies while it reads, in one there are two of each half."""
    shape = (2, 2) if story == "replicas" else (1, 2)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2 * shape[0])
    mesh = init_device_mesh("cpu", shape)
    state = {"w": distribute_tensor(torch.zeros(SHAPE), mesh, [Replicate(), Shard(1)])}
    if story == "dies" and rank == 1:
        setattr(Straight, "pool_rest", die)  # noqa: B010 -- mypy takes no other assignment to a method
    with Checkpointer(str(root / "store"), options=Options(directory=root / "keeper")) as checkpointer:
        restored = checkpointer.restore(state)
    assert restored is not None
    told = {
        "step": restored.step,
        "num_bytes": restored.report.num_bytes,
        "why": [one.why for one in restored.report.fallbacks],
    }
    torch.save(state["w"].to_local(), root / f"half{rank}")
    (root / f"told{rank}").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
