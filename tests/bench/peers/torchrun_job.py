"""The default job as a torchrun user writes it: DDP over gloo, torch.save by rank 0, resume from the newest
file.

`torchrun ... torchrun_job.py LOG CHECKPOINT NUM_STEPS EVERY KILL_STEP`: appends {time, restart, step, rank,
what} lines to LOG.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

VIRTUAL_RANKS, GLOBAL_BATCH = 8, 16
RESTART = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # how often the agent began again


class Parallel(DistributedDataParallel):
    """DDP that also answers for its model's attributes, which a job's loss may read."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def without_face(name: str) -> None:
    """Let `name`'s modules be imported without its __init__, which loads Ray: this peer's restarts do not
    pay for it.
    """
    package = ModuleType(name)
    package.__path__ = [str(Path(__file__).parents[3] / name)]
    sys.modules[name] = package


def main() -> None:
    """Train, and be killed once if this is the last rank."""
    without_face("elastic")
    from elastic.training.gpt import GPTJob, GPTSettings
    from elastic.training.job import Split

    log, checkpoint, num_steps, every, kill_step = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        *map(int, sys.argv[3:6]),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    job, settings = GPTJob(), GPTSettings()
    split = Split(
        name="train", source="stdlib", seed=0, micro_batch=GLOBAL_BATCH // VIRTUAL_RANKS, settings=settings
    )
    dataset = job.dataset(split)
    model = job.model(settings)
    optimizer = job.optimizer(model)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    ddp: Any = Parallel(model)
    rng = torch.Generator()
    for step in range(start, num_steps):
        mine = range(rank, VIRTUAL_RANKS, size)
        for index, virtual_rank in enumerate(mine):
            ddp.require_backward_grad_sync = index == len(mine) - 1
            loss = job.loss(ddp, job.batch(dataset, step, virtual_rank), rng) / len(mine)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        tell(log, step + 1, rank, "step")
        if rank == 0 and (step + 1) % every == 0:
            partial = checkpoint.with_suffix(".partial")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial
            )
            partial.replace(checkpoint)
        if rank == size - 1 and step + 1 == kill_step and RESTART == 0:
            tell(log, step + 1, rank, "kill")
            os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def tell(log: Path, step: int, rank: int, what: str) -> None:
    """Append one line; small appends do not mix."""
    with log.open("a") as file:
        line = {"time": time.monotonic(), "restart": RESTART, "step": step, "rank": rank, "what": what}
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
