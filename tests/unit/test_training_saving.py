"""The trainer's side of saving: what is said while an arena is full, how long a last checkpoint may take."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoint import LocalHost, SavePolicy, Saver, Share, load, open_store
from checkpoint.store.memory import MemoryStore
from elastic.control.events import CheckpointDurable, Ending, Event, StepCommitted
from elastic.control.standing import Standing
from elastic.training.ports import Broken, Flags
from elastic.training.saving import Snapshots
from elastic.training.state import weights_sha256
from elastic.training.trainer import Storage, Trainer
from tests.unit.test_training_trainer import Told, WorldOfOne, plan, trained, trainer_of
from tests.wrapped_stores import Faulty, Slow

__all__ = ["plan"]  # a fixture


class Cramped:
    """A host that lends room only when it is let."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self.may_lend = threading.Event()

    def open(self, ticket: Any, plan: Any) -> Any:
        assert self.may_lend.wait(20)
        return self._host.open(ticket, plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def await_that(is_so: Callable[[], bool]) -> None:
    """Look until something is so."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize(("max_wait_s", "is_told"), [(20.0, True), (0.0, False)])
def test_room_is_told_to_be_waited_for_once_training_can_do_nothing_else_and_as_long_as_that_may_take(
    max_wait_s, is_told
):
    with LocalHost(open_store(f"memory://room-{is_told}"), arena_bytes=1 << 20) as whole:
        host = Cramped(whole)
        saver = Saver(host, "run", SavePolicy(max_wait_s=max_wait_s))
        snapshots = Snapshots(saver, "w0", {})
        snapshots.save(Share.alone(), 1, lambda _: {"w": torch.zeros(8)})
        assert not snapshots.is_waiting_for_room, "the next step is computed meanwhile"
        waiter = threading.Thread(target=snapshots.wait_captured)
        waiter.start()
        if is_told:
            await_that(lambda: snapshots.is_waiting_for_room)
        assert snapshots.is_waiting_for_room is is_told
        host.may_lend.set()
        waiter.join(20)
        assert not snapshots.is_waiting_for_room
        saver.close()


def test_a_last_checkpoint_that_takes_longer_than_it_may_breaks_the_world_so_that_another_one_saves_it(plan):
    store = Faulty(MemoryStore(), [Slow("put_new", 1.0)])
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        trainer = trainer_of(replace(plan, save_s=0.0), storage=Storage(saver))
        with pytest.raises(Broken, match="the final checkpoint is not durable after 0 s"):
            trained(trainer)
        assert trainer.standing.committed == plan.num_steps, "nothing of the state is lost"
        saver.close()


def test_the_step_after_which_a_world_was_told_to_stop_is_told_as_its_last(plan):
    _, events = trained(trainer_of(plan), told=Told(Flags(stop=1)))
    assert [event.is_last for event in events if isinstance(event, StepCommitted)] == [True]
    _, events = trained(trainer_of(plan))
    assert not any(event.is_last for event in events if isinstance(event, StepCommitted))


def test_a_world_that_only_saves_makes_no_step_and_leaves_what_it_held_durable(plan):
    store = open_store("memory://only-saves")
    quiet = trainer_of(plan)
    trained(quiet)
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        trainer = trainer_of(plan, storage=Storage(saver))
        assert trained(trainer, told=Told(Flags(next_generation=2)))[0] is Ending.REGROUP
        for generation in (2, 3):  # the second time it is there already
            ending, events = saved(trainer, generation)
            assert (ending, trainer.standing) == (Ending.STOPPED, Standing(1))
            assert not any(isinstance(event, StepCommitted) for event in events)
            assert [event.step for event in events if isinstance(event, CheckpointDurable)] == [1]
        resumed = trainer_of(plan, storage=Storage(saver, lambda: load(store)))
        assert trained(resumed, 4)[0] is Ending.FINISHED
        assert saved(resumed, 5)[0] is Ending.FINISHED, "all steps are there, whatever the world was for"
        saver.close()
    assert weights_sha256(resumed.model) == weights_sha256(quiet.model)


def test_what_a_world_that_only_saves_has_from_the_seed_or_from_the_store_is_not_saved_again(plan):
    store = open_store("memory://had")
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        fresh = trainer_of(plan, storage=Storage(saver))
        assert saved(fresh, 1) == (Ending.STOPPED, [])
        assert trained(fresh, 2, told=Told(Flags(stop=1)))[0] is Ending.STOPPED
        restored = trainer_of(plan, storage=Storage(saver, lambda: load(store)))
        assert saved(restored, 3) == (Ending.STOPPED, [])
        saver.close()


def test_gradients_that_all_held_are_told_as_a_step_before_a_world_that_only_saves_ends(plan):
    trainer = trainer_of(plan)
    trainer.settle(WorldOfOne(1))
    with pytest.raises(Broken):
        trainer.run(WorldOfOne(1, breaks_at=0), Told(), lambda _: None)
    ending, events = saved(trainer, 2)
    assert (ending, [event.step for event in events if isinstance(event, StepCommitted)]) == (
        Ending.STOPPED,
        [1],
    )


def saved(trainer: Trainer, generation: int) -> tuple[Ending, list[Event]]:
    """Let a trainer settle in a world that only saves."""
    events: list[Event] = []
    world = WorldOfOne(generation)
    trainer.settle(world)
    return trainer.save_and_stop(world, Told(), events.append), events
