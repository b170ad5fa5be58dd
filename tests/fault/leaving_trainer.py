"""A script that saves and ends without a word, in each way there is: one forked child for each."""

import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from checkpoint import Checkpointer, Options
from checkpoint.engine import leaving
from checkpoint.engine.transfer import Transfer

ENDS: dict[str, Callable[[], object]] = {
    "end": lambda: None,
    "exit": lambda: sys.exit(3),
    "raise": lambda: 1 / 0,
    "thread": lambda: threading.Thread(target=time.sleep, args=(0.1,)).start(),
    "stuck": lambda: None,
}


def slowly(*_: object) -> None:
    """Take longer for a capture than the interpreter takes to end."""
    time.sleep(0.7)


def forever(*_: object) -> None:
    """Never capture."""
    threading.Event().wait()


def save_and_end(root: str, end: str) -> None:
    """Save one step to a store of its own, and leave; nothing refers to the checkpointer any longer then."""
    checkpointer = Checkpointer(f"{root}/{end}", options=Options(directory=None, lease_s=0.1))
    checkpointer.save(1, {"weight": torch.ones(100_000)})
    del checkpointer
    ENDS[end]()


def main() -> None:
    """Fork all; wait for them."""
    root, children = sys.argv[1], []
    for end in ENDS:
        pid = os.fork()
        if not pid:
            leaving.PATIENCE_S = 0.3 if end == "stuck" else 30.0
            Transfer.prepare = forever if end == "stuck" else slowly  # type: ignore[method-assign, assignment]
            save_and_end(root, end)
            return
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
