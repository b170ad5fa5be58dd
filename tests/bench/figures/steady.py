"""What elasticity costs while nothing fails, and what slow and lost workers cost, beside torch DDP."""

from collections.abc import Mapping

from elastic.training.gpt import GPTSettings
from tests.bench.elastic_steady import SIZE, Plan, Way, step_times
from tests.bench.elastic_waiting import SMALL, Computing, Waiting, WaitingLayers
from tests.bench.harness import Effort, Goal, Row, row

V, WAIT_S, LAYER_WAIT_S = 28, 0.2, 0.008
V_OF_TWELFTHS = 24  # dealt evenly to three workers and to four
_BOUNDS: Mapping[Way, float] = {"bitwise": 1.10, "fast": 1.03}


def steady(effort: Effort) -> list[Row]:
    """The default job's step, both ways of reducing, beside DDP's on the same micro-batches."""
    rounds, steps = (2, 2) if effort is Effort.QUICK else (9, 6)
    times = step_times(Plan(rounds, steps, ("bitwise", "fast", "DDP"), 8, Computing, GPTSettings()))
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


def overlap(effort: Effort) -> list[Row]:
    """What reducing during backward gains: 24 MiB of gradients, each layer's backward a timed wait."""
    rounds, steps = (2, 2) if effort is Effort.QUICK else (7, 6)
    ways: tuple[Way, ...] = ("bitwise", "bitwise, after", "fast", "fast, after", "DDP")
    times = step_times(Plan(rounds, steps, ways, SIZE, WaitingLayers, {}, wait_s=LAYER_WAIT_S))
    after: Mapping[Way, Way] = {"bitwise": "bitwise, after", "fast": "fast, after"}
    return [
        row(
            f"step, {way}, backward a timed wait, world of {SIZE}",
            "s",
            ours=times[way],
            peers={"without overlap": times[after[way]], "DDP": times["DDP"]},
        )
        for way in after
    ]


def straggler(effort: Effort) -> list[Row]:
    """One worker at half speed; a timed wait stands in for computing."""
    rounds, steps = (1, 3) if effort is Effort.QUICK else (5, 3)
    waits = step_times(Plan(rounds, steps, ("bitwise", "DDP"), V, Waiting, SMALL, WAIT_S, slowness=2.0))
    ideal_s = V * WAIT_S / (SIZE - 0.5)
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


def shrunken(effort: Effort) -> list[Row]:
    """Survivors while a replacement starts; ideal is each one's speed times their number."""
    rounds, steps = (1, 3) if effort is Effort.QUICK else (5, 3)
    waits = step_times(Plan(rounds, steps, ("bitwise", "shrunken"), V_OF_TWELFTHS, Waiting, SMALL, WAIT_S))
    sizes: Mapping[Way, int] = {"bitwise": SIZE, "shrunken": SIZE - 1}
    shares = {way: V_OF_TWELFTHS / size * WAIT_S / waits[way] for way, size in sizes.items()}
    return [
        row(f"world of {SIZE}: share of the ideal throughput", "", ours=shares["bitwise"]),
        row(
            f"{SIZE - 1} of {SIZE} workers while a cold replacement starts: share of the ideal throughput",
            "",
            ours=shares["shrunken"],
            goal=Goal(">=", 0.95),
        ),
    ]
