"""What the controller needs of a core for each event, with ten thousand members."""

from tests.bench.harness import Effort, Goal, Row, row
from tests.sim.fleet import Stopwatch, trained

NUM_MEMBERS = 10_000


def control(effort: Effort) -> list[Row]:
    """Steps that every member tells and a member's loss, with ten looks at all of them a second."""
    means = []
    for _ in range(1 if effort is Effort.QUICK else 5):
        watch = Stopwatch()
        fleet = trained(NUM_MEMBERS, watch)
        means.append(watch.seconds / fleet.num_events * 1e6)
    return [
        row(
            f"mean cost of an event to the controller, {NUM_MEMBERS} members",
            "µs",
            ours=sorted(means)[len(means) // 2],
            goal=Goal("<=", 100.0),
        )
    ]
