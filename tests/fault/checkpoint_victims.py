"""Processes that are killed at their k-th write, one for each k; each leaves a store and what it was told."""

import os
import signal
import sys
from pathlib import Path

from checkpoint import LocalHost, Saver, open_store
from checkpoint.store.wrappers import Death, Faulty
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps, save_alone


def save_and_die(root: Path, k: int) -> None:
    """Save three steps, noting each one that is acknowledged, and be killed at the k-th write."""
    root.mkdir()
    store = Faulty(open_store(str(root / "store")), [Death("put_new", k)])
    saver = Saver(LocalHost(store, arena_bytes=MIB, tuning=QUICK), "run", RAW)
    for step in (1, 2, 3):
        for durable in durable_steps(save_alone(saver, step)):
            with open(root / "acknowledged", "a", encoding="utf-8") as file:
                file.write(f"{durable}\n")


def main(directory: str, num_writes: int) -> None:
    """Fork the victims one after the other, while this process has no threads; each has to die by SIGKILL."""
    for k in range(1, num_writes + 1):
        if (pid := os.fork()) == 0:
            save_and_die(Path(directory) / str(k), k)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the victim of write {k} survived")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
