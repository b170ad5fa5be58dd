"""Ten thousand members under failures like those of Llama 3's training: it loses no step, and events stay
cheap. What they cost is counted in bytecode instructions; `make bench NAME=elastic` tells the microseconds.
"""

import pytest

from elastic.control.events import MemberCame, MemberReady, Settled, StepCommitted, Tick, WorldFormed
from tests.sim.fleet import Fleet, Odometer, trained

NUM_MEMBERS = 10_000
FEW = 200
NUM_STEPS, STEP_S = 1440, 120.0  # two days
CHEAP = 2000  # instructions, about 12 microseconds; 100 is what an event may cost


@pytest.mark.slow
def test_ten_thousand_members_lose_no_step_to_failures_like_llama_3s() -> None:
    fleet = Fleet(NUM_MEMBERS)
    fleet.run(NUM_STEPS, STEP_S)
    num_steps = max(fleet.committed)
    assert sorted(fleet.committed) == list(range(1, num_steps + 1))
    assert set(fleet.committed.values()) == {1}, "a step was committed twice"
    assert num_steps > 0.9 * NUM_STEPS
    generations = [world.generation for world in fleet.worlds]
    assert generations == sorted(set(generations))
    assert len(fleet.worlds) > 10, "the failures did not happen"
    assert min(len(world.members) for world in fleet.worlds) > NUM_MEMBERS - 10


@pytest.mark.slow
def test_what_an_event_costs_does_not_grow_with_the_members() -> None:
    few, many = Odometer(), Odometer()
    trained(FEW, few)
    trained(20 * FEW, many)
    assert many.mean < CHEAP
    assert many.mean < 1.2 * few.mean
    for kind in (MemberReady, MemberCame, WorldFormed, Settled, StepCommitted):
        assert many.per_event(kind) < 1.2 * few.per_event(kind), kind
    # A look at all members costs each of them the same.
    assert many.per_event(Tick) < 20 * 1.2 * few.per_event(Tick)
