"""A script as a user writes one for torchrun: data parallel, and a checkpoint of every step."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Checkpointer, Options, Rng


def main(directory: Path, last: int, doom: int) -> None:
    """Train to step `last`; in its first life rank 1 is killed in step `doom`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    state = {"model": model, "optimizer": optimizer, "rng": Rng()}
    options = Options(lease_s=1.0, directory=directory / "keeper", arena_mib=8)
    with Checkpointer(str(directory / "store"), every=1, memory=1, options=options) as checkpointer:
        restored = checkpointer.restore(state)
        first = restored.step if restored else 0
        with (directory / f"lives-{rank}").open("a") as lives:
            lives.write(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {first}\n")
        for step in range(first + 1, last + 1):
            chosen = torch.Generator().manual_seed(100 * step + rank)
            model(torch.randn(4, 8, generator=chosen)).square().mean().backward()
            if rank == 1 and step == doom and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.save(step, state)
    if rank == 0:
        torch.save(model.module.state_dict(), directory / f"weights-{last}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
