"""A job that fails leaves what its steps had committed: it can still be saved, and nothing half done is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint import LocalHost, Saver, load, open_store
from elastic.control.events import CheckpointDurable, Ending, Event
from elastic.control.standing import BLANK
from elastic.training.blame import UserFailure
from elastic.training.trainer import Storage
from tests.joining import ChosenJob, finished, in_one_thread, trainer_of
from tests.unit.test_training_trainer import Told, WorldOfOne, trained

__all__ = ["in_one_thread"]


class Failing(ChosenJob):
    """A job of which one micro-batch cannot be read."""

    def batch(self, dataset: None, step: int, virtual_rank: int) -> Tensor:
        if (step, virtual_rank) == (5, 2):
            raise SystemExit(3)
        return super().batch(dataset, step, virtual_rank)


class Halfway(torch.optim.AdamW):
    """An optimizer that fails in its sixth step, after it has changed something."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        result = super().step(closure)
        if self.num_steps == 6:
            raise RuntimeError("halfway")
        return result


def test_a_world_that_only_saves_saves_what_the_failed_job_had_committed():
    quiet = trainer_of(ChosenJob())
    trained(quiet)
    store = open_store("memory://failed")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        failed = trainer_of(Failing(), storage=Storage(saver))
        with pytest.raises(UserFailure, match="step 5, virtual rank 2: SystemExit: 3"):
            trained(failed)
        events: list[Event] = []
        assert failed.settle(WorldOfOne(2)).step == 5
        assert failed.save_and_stop(WorldOfOne(2), Told(), events.append) is Ending.STOPPED
        assert [event.step for event in events if isinstance(event, CheckpointDurable)] == [5]
        saver.close()
    mended = trainer_of(ChosenJob(), storage=Storage(None, lambda: load(store)))
    assert finished(mended, 3) == quiet.weights_sha256()


def test_a_step_that_the_optimizer_left_halfway_is_no_state_any_more():
    trainer = trainer_of(ChosenJob(make_optimizer=lambda model: Halfway(model.parameters(), lr=1e-2)))
    with pytest.raises(UserFailure, match="at step 5: RuntimeError: halfway"):
        trained(trainer)
    assert trainer.standing.committed == BLANK
