"""What elasticity costs while nothing fails, and what a slow worker costs: steps beside torch DDP's."""

from collections.abc import Mapping

from elastic.training.gpt import GPTSettings
from tests.bench.elastic_steady import SIZE, Plan, Way, step_times
from tests.bench.harness import Effort, Goal, Row, row

WAIT_S = 0.04
_BOUNDS: Mapping[Way, float] = {"bitwise": 1.10, "fast": 1.03}


def steady(effort: Effort) -> list[Row]:
    """The default job's step, both ways of reducing, beside DDP's on the same micro-batches."""
    rounds, steps = _size(effort)
    times = step_times(Plan(rounds, steps, virtual_ranks=8, settings=GPTSettings()))
    return [
        row(
            f"step, {way}, world of {SIZE}",
            "s",
            ours=times[way],
            peers={"DDP": times["DDP"]},
            goal=Goal("<=", bound, of="ratio"),
        )
        for way, bound in _BOUNDS.items()
    ]


def straggler(effort: Effort) -> list[Row]:
    """One worker at half speed; a timed wait stands in for computing, which two cores could not show."""
    rounds, steps = _size(effort)
    small = GPTSettings(num_layers=1, width=32, num_heads=2, sequence=16)
    waits = step_times(Plan(rounds, steps, virtual_ranks=28, settings=small, wait_s=WAIT_S))
    ideal_s = 28 * WAIT_S / (SIZE - 0.5)
    return [
        row(
            f"one of {SIZE} workers at half speed: share of the ideal throughput",
            "",
            ours=ideal_s / waits["bitwise"],
            peers={"DDP": ideal_s / waits["DDP"]},
            better="higher",
            goal=Goal(">=", 0.9),
        )
    ]


def _size(effort: Effort) -> tuple[int, int]:
    return (2, 2) if effort is Effort.QUICK else (7, 6)
