"""A job that fails leaves what its steps had committed: it can still be saved, and nothing half done is."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint import Catalog, LocalHost, Saver, load, open_store
from elastic.control.events import CheckpointDurable, Ending, Event
from elastic.control.standing import BLANK
from elastic.errors import ReplicasDiffer
from elastic.training.blame import UserFailure
from elastic.training.trainer import Storage
from elastic.training.watching import MAX_DISPUTES, _Dispute
from tests.joining import PLAN, ChosenJob, finished, in_one_thread, trainer_of
from tests.unit.test_training_replicas import worlds_of
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


def test_replicas_that_differ_without_end_leave_no_state_and_a_world_that_only_saves_restores_one():
    store = open_store("memory://disputed")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        quiet = trainer_of(ChosenJob(), replace(PLAN, num_steps=4, save_every=4), Storage(saver))
        trained(quiet)
        storage = Storage(saver, lambda: load(store))
        pair = [trainer_of(ChosenJob(), replace(PLAN, compare_every=1), storage, name) for name in "ab"]
        pair[1]._replica_watch._dispute = pair[0]._replica_watch._dispute = _Dispute(count=MAX_DISPUTES - 1)
        with torch.no_grad():
            for one in pair:
                one.settle(WorldOfOne(2))
            next(pair[1].model.parameters()).view(-1)[0] += 1
        with ThreadPoolExecutor(2) as ranks:
            worlds = worlds_of(2)
            saving = [ranks.submit(pair[r].save_and_stop, worlds[r], Told(), print) for r in (0, 1)]
            for ending in saving:
                with pytest.raises(ReplicasDiffer, match="computes wrongly"):
                    ending.result(timeout=60)
        assert [one.standing.committed for one in pair] == [BLANK, BLANK]
        assert pair[1].settle(WorldOfOne(5)).source == "store"
        assert pair[1].save_and_stop(WorldOfOne(5), Told(), print) is Ending.STOPPED
        assert pair[1].weights_sha256() == quiet.weights_sha256()
        saver.close()


def test_an_optimizer_that_fails_in_a_world_that_goes_on_to_save_restores_its_last_checkpoint():
    store = open_store("memory://halfway")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        storage = Storage(saver, lambda: load(store) if Catalog(store).steps() else None)
        job = ChosenJob(make_optimizer=lambda model: Halfway(model.parameters(), lr=1e-2))
        trainer = trainer_of(job, replace(PLAN, save_every=4), storage)
        with pytest.raises(UserFailure, match="at step 5: RuntimeError: halfway"):
            trained(trainer)
        assert saver.drain(60), "what was saved before is durable"
        settled = trainer.settle(WorldOfOne(2))
        assert (settled.step, settled.source) == (4, "store")
        assert trainer.save_and_stop(WorldOfOne(2), Told(), print) is Ending.STOPPED
        assert Catalog(store).steps() == [4]
        saver.close()
