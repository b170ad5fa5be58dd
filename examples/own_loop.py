"""The checkpoint engine alone, in a plain PyTorch loop. Run it twice: it goes on where it was."""

import torch

from checkpoint import Checkpointer


def main(url: str, num_steps: int = 50) -> int:
    """Train so many more steps, saving every tenth; return the step reached."""
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(url, every=10) as checkpointer:
        restored = checkpointer.restore(state)
        start = restored.step if restored else 0
        for step in range(start + 1, start + num_steps + 1):
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()  # waits until what it is about to change has been copied
            checkpointer.save(step, state)  # returns at once
    return start + num_steps
