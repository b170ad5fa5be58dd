"""A training loop to be killed: every step goes to the keeper's memory, every fifth to the store."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import Checkpointer, Options

EVERY = 5


def make() -> dict[str, Any]:
    """Make the state that step 0 begins with, always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train(state: dict[str, Any], step: int) -> None:
    """Make one step, which depends on the state and its number alone."""
    data = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
    state["model"](data).square().mean().backward()
    state["optimizer"].step()
    state["scheduler"].step()
    state["optimizer"].zero_grad()


def checkpointer(root: Path) -> Checkpointer:
    """Open the run's checkpoints, as the trainer and its successor do."""
    options = Options(arena_mib=4, lease_s=5.0, directory=root / "keeper")
    return Checkpointer(str(root / "store"), run="killed", every=EVERY, memory=2, options=options)


def main(directory: str) -> None:
    """Train for ever, and say after each step that it is captured."""
    root, state = Path(directory), make()
    checkpoints = checkpointer(root)
    with open(root / "diary", "w", buffering=1, encoding="utf-8") as diary:
        for step in range(1, 1_000_000):
            train(state, step)
            checkpoints.save(step, state)
            checkpoints.wait_captured()
            diary.write(f"{step}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
