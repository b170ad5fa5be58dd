"""The controller under seeded chaos: what it promises must hold, whatever goes wrong.

Members die, hang, are slow, are cut off from the driver or from each other, are taken away with or without
notice, join (where there is a place for them), and are told to stop; a step may kill whoever computes it;
drivers die and sleep, and have successors; messages come late, twice, in another order, or never.
"""

import random

import pytest

from elastic.control.instructions import FormWorld, KillMember, ReleaseMember, Status
from tests.sim.chaos import Chaos
from tests.sim.cluster import NUM_STEPS

REPLAYED = 10  # every so many seeds the story is decided again


@pytest.mark.parametrize("block", range(10))
def test_every_run_ends_and_no_committed_step_is_lost(block: int) -> None:
    live_through(range(block * 50, block * 50 + 50))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(1, 41))
def test_every_one_of_20000_runs_ends_and_no_committed_step_is_lost(block: int) -> None:
    live_through(range(block * 500, block * 500 + 500))


def live_through(seeds: range) -> None:
    """Play each seed's run, and hold it to the promises."""
    num_given_up = 0
    for seed in seeds:
        chaos = Chaos(seed)
        end = chaos.run()
        if "workers were lost" in end.reason or "the job raised" in end.reason:  # that is what it was
            num_given_up += "in a row without a step" in end.reason and not chaos.is_deadly
            check_saved(chaos)
            continue
        assert end.status is Status.FINISHED, chaos.explain(f"the run ended as {end}")
        check_steps(chaos)
        check_story(chaos)
        if seed % REPLAYED == 0:
            check_replay(chaos)
    assert num_given_up <= 1 + len(seeds) // 100


def check_saved(chaos: Chaos) -> None:
    """Whoever was left saved what it held; who is cut off from the driver does so with its lease."""
    (last,) = (driver for driver in chaos.drivers if driver.end is not None)
    left = [chaos.cluster.nodes.get(name) for name in last.controller.members.hosts]
    reached = [node for node in left if node is not None and not node.is_cut_off]
    held = max((node.standing.committed for node in reached), default=0)
    assert held <= max(chaos.cluster.durable, 0), chaos.explain(f"step {held} is held, and not durable")


def check_steps(chaos: Chaos) -> None:
    """All steps were committed one after the other, each by one world; all are durable."""
    newest = 0
    for _, step in chaos.cluster.committed:
        assert step <= newest + 1, chaos.explain(f"step {step} was committed after step {newest}")
        newest = step
    assert newest == chaos.cluster.durable == NUM_STEPS, chaos.explain("not all steps are durable")


def check_story(chaos: Chaos) -> None:
    """Every decision gives its reason, and each generation has one order, by the driver that claimed it."""
    for _, who, entry in chaos.story:
        if isinstance(entry, FormWorld | KillMember | ReleaseMember):
            assert entry.reason, chaos.explain(f"{who} gave no reason for {entry}")
    for generation, world in chaos.cluster.worlds.items():
        assert chaos.cluster.claims[generation] == world.owner, chaos.explain(f"two drivers own {generation}")


def check_replay(chaos: Chaos) -> None:
    """What a driver was told decides all that it did."""
    for driver in chaos.drivers:
        decided = [instructions for _, _, instructions in driver.told]
        assert driver.replay() == decided, chaos.explain(f"{driver.name} decides otherwise in the replay")


@pytest.mark.parametrize("block", range(5))
def test_a_stop_ends_the_run_with_a_durable_checkpoint_of_its_last_step(block: int) -> None:
    for seed in range(block * 20, block * 20 + 20):
        chaos = Chaos(seed, stop_at_s=random.Random(seed).uniform(0.0, 20.0))
        end = chaos.run()
        if "workers were lost" in end.reason or "the job raised" in end.reason:
            check_saved(chaos)
            continue
        assert end.status in (Status.STOPPED, Status.FINISHED), chaos.explain(f"the run ended as {end}")
        if chaos.cluster.committed and "no worker is left" not in end.reason:
            assert chaos.cluster.durable == chaos.cluster.newest, chaos.explain(
                "the last step is not durable"
            )
