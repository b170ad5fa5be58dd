"""Layers that depend on the data, under sharded parameters: refused by name, before ranks mix them up."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import _unregister_all_process_groups

from elastic.errors import JobRejected
from elastic.training.lockstep import COLLECT, END, GATHER, Lockstep
from elastic.training.plan import TrainPlan
from elastic.training.units import WHOLE
from tests.property.test_training_reduction import ThreadWorld
from tests.unit.test_training_trainer import plan, trained, trainer_of
from tests.unit.test_training_units import Stack, StackJob

__all__ = ["plan"]  # a fixture
Stop = tuple[int, int]
STEADY = [(GATHER, 0), (GATHER, 1), (COLLECT, 1), (COLLECT, 0), (COLLECT, WHOLE), (END, 0)]


def told_by(everyones: list[list[Stop]]) -> list[str]:
    """Let every rank come to its stops; return what each was told, nothing where all was well."""
    barrier = threading.Barrier(len(everyones), timeout=5)
    board: dict[Any, Any] = {}

    def one_rank(rank: int) -> str:
        world = ThreadWorld(rank, len(everyones), board, barrier)
        lockstep = Lockstep(["layers.0", "layers.1"], nullcontext)
        try:
            for kind, unit in everyones[rank]:
                lockstep.come_to(world, kind, unit)
        except JobRejected as rejected:
            return str(rejected)
        return ""

    with ThreadPoolExecutor(len(everyones)) as pool:
        return list(pool.map(one_rank, range(len(everyones))))


def test_ranks_that_come_to_other_layers_in_the_first_micro_batch_are_all_told_which():
    one, other = told_by([[(GATHER, 0)], [(GATHER, 1)]])
    assert one == other
    assert "the parameters of layers.0 where another one came to the parameters of layers.1" in one
    assert "training.parameter_copies = 0" in one


def test_a_rank_that_has_ended_its_micro_batch_before_the_others_is_found_as_well():
    told = told_by([STEADY, [*STEADY[:2], (END, 0)]])
    assert all("gradients of layers.1" in each and "its end" in each for each in told)


@pytest.mark.parametrize(
    "later",
    [
        STEADY[1:],
        [*STEADY[:2], *STEADY[3:]],
        [*STEADY[:3], STEADY[-1]],
        [*STEADY[:1], STEADY[0]],
        [*STEADY[:-1], STEADY[0]],
    ],
)
def test_a_later_micro_batch_that_goes_another_way_is_refused_by_its_rank_alone(later):
    well, refused = told_by([STEADY + STEADY, STEADY + later])
    assert well == ""
    assert "in every micro-batch" in refused


def test_steady_micro_batches_go_on():
    assert told_by([STEADY * 3] * 3) == [""] * 3


class Dropping(Stack):
    """Skips its layer in half of the micro-batches."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_times = int(torch.randint(2, ()))
        return super().forward(tokens)


class DroppingJob(StackJob):
    """A job whose model has a layer that some micro-batches do without."""

    def model(self, settings: Any) -> Any:
        return Dropping(1)


def test_a_layer_that_some_micro_batches_skip_is_refused_in_a_world_of_one(plan: TrainPlan):
    trained(trainer_of(plan, DroppingJob()))
    with pytest.raises(JobRejected, match=r"layers\.0.*training\.parameter_copies = 0"):
        trained(trainer_of(replace(plan, parameter_copies=1), DroppingJob()))


def test_sharded_training_outlives_the_names_of_groups_that_torch_forgets(plan: TrainPlan):
    """As it does when somebody destroys the default group."""
    for _ in range(2):
        trained(trainer_of(replace(plan, parameter_copies=1), StackJob()))
        _unregister_all_process_groups()
