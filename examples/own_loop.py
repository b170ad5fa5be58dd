"""The checkpoint engine alone, in a plain PyTorch loop. Run it twice: it goes on where it was."""

import sys

import torch

import checkpoint


def main(url: str, num_steps: int = 50) -> int:
    """Train `num_steps` more steps, saving every tenth; return the step reached."""
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    store = checkpoint.open_store(url)
    start = 0
    if checkpoint.Catalog(store).latest() is not None:
        state = checkpoint.load(store).state
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    host = checkpoint.LocalHost(store, arena_bytes=1 << 24)
    saver = checkpoint.Saver(host.session(), run="own-loop")
    for step in range(start, start + num_steps):
        loss = model(torch.ones(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        saver.wait_captured()  # the optimizer may not change what is still being copied
        optimizer.step()
        if (step + 1) % 10 == 0:  # returns at once; copied while the next forward and backward run
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            saver.save(step + 1, state, checkpoint.Share.alone(), meta={})
    saver.drain(timeout_s=60)
    saver.close()
    host.close()
    return start + num_steps


if __name__ == "__main__":
    sys.stdout.write(f"at step {main(sys.argv[1])}\n")
