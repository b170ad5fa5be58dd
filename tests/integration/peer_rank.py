"""Worlds of which every rank is a host of its own: they hold what they save in memory only, and restore."""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoint import Parity
from checkpoint.checkpointer import Checkpointer, Options

STEPS = 3


def make(step: int) -> dict[str, Any]:
    """Make a replicated and a sharded tensor that are different at every step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.randn(24, 1000, generator=torch.Generator().manual_seed(step))
    return {"plain": whole[:7].clone(), "sharded": distribute_tensor(whole, mesh, [Shard(0)]), "step": step}


def be_rank(root: Path, host: str, rank: int, size: int) -> None:
    """Restore, tell what was restored and from where, and save steps until this process is killed."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/meeting-{size}-{(root / 'round').read_text()}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    options = Options(
        directory=root / f"keeper-{host}", host=host, arena_mib=4, lease_s=30.0, address="127.0.0.1",
        parity=Parity(group_size=size, losses=1, patience_s=20.0) if size > 1 else None,
    )  # fmt: skip
    state = make(0)
    checkpointer = Checkpointer(str(root / "store"), every=1000, memory=1, options=options)
    restored = checkpointer.restore(state)
    told: dict[str, Any] = {"step": 0}
    if restored is not None:
        wanted = make(restored.step)
        told = {
            "step": restored.step,
            "same": torch.equal(state["plain"], wanted["plain"])
            and torch.equal(state["sharded"].full_tensor(), wanted["sharded"].full_tensor())
            and state["step"] == restored.step,
            "sources": dict(restored.report.bytes_by_source),
            "notes": restored.notes,
        }
    saving = None
    for step in range(told["step"] + 1, told["step"] + 1 + STEPS):
        saving = checkpointer.save(step, make(step))
        checkpointer.wait_captured()
    assert saving is not None
    if size > 1:
        deadline = time.monotonic() + 40  # the keepers may come together only after these saves
        while (parity := _protected(checkpointer, saving)) is None:
            assert time.monotonic() < deadline
            saving = checkpointer.save(saving.step + 1, make(saving.step + 1)) or saving
            checkpointer.wait_captured()
            time.sleep(0.2)
        told["protected"] = parity
    dist.barrier()
    (root / f"told-{host}.json").write_text(json.dumps(told))
    time.sleep(120)


def _protected(checkpointer: Checkpointer, saving: Any) -> int | None:
    """Return the step that is protected, if this one is by now on all ranks."""
    fate = saving.durable("parity")
    done = torch.tensor([int(fate.done() and fate.exception() is None)])
    dist.all_reduce(done, dist.ReduceOp.MIN)
    return saving.step if int(done) else None


def main(directory: str, hosts: list[str]) -> None:
    """Fork a rank for each host, because torch takes long to load; end them when this process is told to."""
    children: list[int] = []

    def end(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    for rank, host in enumerate(hosts):
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                be_rank(Path(directory), host, rank, len(hosts))
            except BaseException:  # noqa: BLE001 -- the end of the process
                traceback.print_exc()
            os._exit(1)
        children.append(pid)
    for _ in hosts:
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
