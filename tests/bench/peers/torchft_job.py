"""The default job as a torchft user writes it: every worker a replica group of its own, DDP through the
manager. `torchft_job.py COURSE TIMEOUT_S` runs the lighthouse and the workers.

TIMEOUT_S is both the process group's timeout and the lighthouse's patience with a heart that does not beat: 5
is torchft's default of the one, and its examples' value of the other.
"""

import sys
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torchft import (  # type: ignore[import-not-found,unused-ignore]
    DistributedDataParallel,
    Manager,
    Optimizer,
    ProcessGroupGloo,
)
from torchft.coordination import LighthouseServer  # type: ignore[import-not-found,unused-ignore]

from tests.bench.peers.default_job import Answers, Course, Work, read_course

SIZE = 4
JOIN_MS = 10_000


class Managed(Answers, DistributedDataParallel):  # type: ignore[misc]  # it is not where types are checked
    """torchft's DDP over such a model."""


def main() -> None:
    """Run the lighthouse, and the workers until they end."""
    course, timeout_s = read_course(sys.argv[1]), float(sys.argv[2])
    lighthouse = LighthouseServer(
        bind="[::]:0",
        min_replicas=2,
        join_timeout_ms=JOIN_MS,
        heartbeat_timeout_ms=int(timeout_s * 1000),
    )
    port = lighthouse.address().rpartition(":")[2]
    spawn = get_context("spawn")
    arguments = [(course, number, f"http://127.0.0.1:{port}", timeout_s) for number in range(SIZE)]
    workers = [spawn.Process(target=live, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lighthouse.shutdown()


def live(course: Course, number: int, lighthouse: str, timeout_s: float) -> None:
    """Train as one replica group; the last one is killed once."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    work = Work(course)

    def load(state: dict[str, Any]) -> None:
        work.model.load_state_dict(state["model"])
        work.optimizer.load_state_dict(state["optimizer"])

    manager: Any = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=timeout_s)),
        min_replica_size=2,
        load_state_dict=load,
        state_dict=lambda: work.state(manager.current_step()),
        replica_id=f"replica-{number}",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
        hostname="127.0.0.1",
    )
    ddp = Managed(manager, work.model)
    optimizer = Optimizer(manager, work.optimizer)
    while (step := manager.current_step()) < course.num_steps:
        optimizer.zero_grad()
        size = max(1, manager.num_participants())
        rank = manager.participating_rank() or 0
        work.accumulate(ddp, step, rank, size)
        optimizer.step()
        if manager.current_step() > step:
            work.tell(step + 1, number, int(step >= course.kill_step))
            if number == SIZE - 1 and step + 1 == course.kill_step:
                work.die(step + 1, number)
    manager.shutdown()


if __name__ == "__main__":
    main()
