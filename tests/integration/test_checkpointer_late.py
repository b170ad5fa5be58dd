"""A keeper on another host commits while the ranks come together: its step is the one that is restored."""

import os
import time
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from checkpoint import Checkpointer, Options
from checkpoint.checkpointer.hosting import find_host

FIND = "checkpoint.checkpointer.checkpointer.find_host"
LATE_S = 1.0  # by then the first rank has come to its own restore, and would have looked


def restore(rank: int, root: str) -> None:
    """Be one rank, on a host of its own; on the second one a keeper commits before it is looked for."""
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)

    def come_late(*given: object) -> object:
        time.sleep(LATE_S)
        os.rename(f"{root}/held", f"{root}/store/manifests/{2:012d}")
        return find_host(*given)  # type: ignore[arg-type]

    with Checkpointer(f"{root}/store", options=Options(host=f"h{rank}")) as checkpointer, ExitStack() as late:
        if rank == 1:
            late.enter_context(patch(FIND, come_late))
        state = {"w": torch.zeros(4)}
        restored = checkpointer.restore(state)
        assert restored is not None and restored.step == 2, restored
        assert state["w"].tolist() == [2.0] * 4
    dist.destroy_process_group()
    os._exit(0)  # as in apart_rank.py


@pytest.mark.slow
def test_a_step_that_another_host_s_keeper_commits_meanwhile_is_restored_by_all(tmp_path):
    with Checkpointer(str(tmp_path / "store")) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.full((4,), float(step))})
            assert checkpointer.wait()
    (tmp_path / f"store/manifests/{2:012d}").rename(tmp_path / "held")
    spawn(restore, (str(tmp_path),), 2)
