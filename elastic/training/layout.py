"""How a run's state lies on the ranks: in replicas, with a sharded optimizer, or all of it in shards."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn

from elastic.training.gradients import GradientRows
from elastic.training.plan import TrainPlan
from elastic.training.reduction import REDUCTIONS, Reduction
from elastic.training.sharding import ShardedLearner
from elastic.training.state import Learner

if TYPE_CHECKING:
    from elastic.training.fully_sharded import FullyShardedLearner

Waiting = Callable[[], AbstractContextManager[None]]


def lay_out(
    first: Learner,
    build: Callable[[nn.Module], Learner],
    plan: TrainPlan,
    *,
    device: torch.device,
    waiting: Waiting,
) -> tuple["Learner | ShardedLearner | FullyShardedLearner", Reduction]:
    """Let a first state lie on the ranks as the plan says, with the reduction that brings gradients there.

    `build` makes a learner of another model; `waiting` is entered while other ranks are waited for.
    """
    rows = GradientRows(first.model, plan.virtual_ranks)
    if plan.parameter_copies:
        # Loading torch's FSDP takes a second or two, which a replacement's start would pay for nothing.
        from elastic.training.fully_sharded import FullyShardedLearner  # noqa: PLC0415
        from elastic.training.sharded_reduction import ShardedReduction  # noqa: PLC0415

        sharded = FullyShardedLearner(first, build, plan.parameter_copies, device=device, waiting=waiting)
        return sharded, ShardedReduction(sharded, plan.virtual_ranks)
    reduction = REDUCTIONS[plan.determinism](rows, plan.bucket_mib)
    copies = plan.optimizer_copies
    return ShardedLearner(first, copies, device) if copies else first, reduction
