"""The default job as a Ray Train user writes it: TorchTrainer, DDP over gloo, rank 0 reports checkpoints.

`ray_train_job.py COURSE process` kills a worker's process, `... node` the worker's raylet and all its
processes; the world is elastic then, as no node is left for a fourth worker.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from tests.bench.peers.default_job import Answering, Course, Work, read_course, tell
from tests.bench.peers.nodes import kill_all, node_of, nodes

SIZE = 4
POLL_S = 0.02


def main() -> None:
    """Train on a Ray of its own."""
    course, victim = read_course(sys.argv[1]), sys.argv[2]
    if victim == "node":
        with nodes(SIZE) as address:
            ray.init(address=address, log_to_driver=False)
            threading.Thread(target=strike, args=(course,), daemon=True).start()
            fit(course, victim, (2, SIZE))
            ray.shutdown()
    else:
        variables = {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
        ray.init(
            address="local",
            num_cpus=SIZE + 1,
            include_dashboard=False,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
        )
        fit(course, victim, SIZE)


def fit(course: Course, victim: str, num_workers: Any) -> None:
    """Train to the end."""
    TorchTrainer(
        live,
        train_loop_config={"course": course.written(), "victim": victim},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(
            name="bench",
            storage_path=str(course.directory / "storage"),
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()


def live(options: dict[str, Any]) -> None:
    """Train on one worker; the last one is killed once, or waits for its node's end."""
    course = read_course(options["course"])
    rank, size = dist.get_rank(), dist.get_world_size()
    work = Work(course)
    newest = train.get_checkpoint()
    life, start = 0, 0
    if newest is not None:
        with newest.as_directory() as directory:
            start = work.load(Path(directory) / course.checkpoint.name)
    if course.log.exists() and '"kill"' in course.log.read_text():
        life = 1
    ddp = Answering(work.model)
    for step in range(start, course.num_steps):
        work.accumulate(ddp, step, rank, size)
        work.optimizer.step()
        work.optimizer.zero_grad(set_to_none=False)
        work.tell(step + 1, rank, life)
        if (step + 1) % course.every == 0:
            report(work, course, step + 1)
        if rank == size - 1 and step + 1 == course.kill_step and life == 0:
            if options["victim"] == "process":
                work.die(step + 1, rank)
            (course.directory / "victim").write_text(str(os.getpid()))


def report(work: Work, course: Course, step: int) -> None:
    """Report a checkpoint, which all workers do together and rank 0 saves."""
    with tempfile.TemporaryDirectory() as directory:
        if dist.get_rank() == 0:
            torch.save(work.state(step), Path(directory) / course.checkpoint.name)
            train.report({"step": step}, checkpoint=Checkpoint.from_directory(directory))
        else:
            train.report({"step": step})


def strike(course: Course) -> None:
    """Kill the node of the worker that says it is the victim."""
    victim = course.directory / "victim"
    while not victim.exists() or not victim.read_text():
        time.sleep(POLL_S)  # until the step of the kill is made
    node = node_of(int(victim.read_text()))
    tell(course, "kill", course.kill_step, SIZE - 1, 0)
    kill_all(node)


if __name__ == "__main__":
    main()
