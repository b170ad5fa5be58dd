"""The default job as a torchrun user writes it: DDP over gloo, torch.save by rank 0, resume from the newest
file. `torchrun ... torchrun_job.py COURSE`.
"""

import os
import sys

import torch
import torch.distributed as dist

from tests.bench.peers.default_job import Answering, Work, read_course

LIFE = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # how often the agent began again


def main() -> None:
    """Train, and be killed once if this is the last rank."""
    course = read_course(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    work = Work(course)
    start = work.load(course.checkpoint)
    ddp = Answering(work.model)
    for step in range(start, course.num_steps):
        work.accumulate(ddp, step, rank, size)
        work.optimizer.step()
        work.optimizer.zero_grad(set_to_none=False)
        work.tell(step + 1, rank, LIFE)
        if rank == 0 and (step + 1) % course.every == 0:
            partial = course.checkpoint.with_suffix(".partial")
            torch.save(work.state(step + 1), partial)
            partial.replace(course.checkpoint)
        if rank == size - 1 and step + 1 == course.kill_step and LIFE == 0:
            work.die(step + 1, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
