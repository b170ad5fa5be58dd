"""What checkpoints cost a whole run: wall time of the same steps with and without them, taken in turn.

Machines wander by more than checkpoints cost. So what is saved at every step is measured in short blocks of
steps, each between two without checkpoints; the figure is the median of how much longer it is than those,
beside how much those differ from each other, and the standard errors of both medians.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median, quantiles

from tests.bench.figures.session import GIB, OURS_CODEC, OURS_MEMORY, Lane, rounds, session
from tests.bench.harness import Effort, Goal, Row, row

NOTHING = "nothing"
PEER = "dcp.async_save, reused stager"
NUM_BYTES, STEP_S = GIB // 2, 0.5
DISK_EVERY = 10
BLOCK_STEPS = 2
_CLOCKS = ("wall", "cpu")

Shares = Mapping[str, Sequence[float]]  # by clock: how much longer, as a share


def slowdown(effort: Effort) -> list[Row]:
    """Measure every step to keeper memory, and every tenth to disk with the default codec.

    Segments to disk are long, and compared with the mean of their round's two without checkpoints (in the
    trainer that is ours, around the others), so that a machine that slows down slows all of them down.
    """
    num_blocks, num_rounds = (4, 1) if effort is Effort.QUICK else (32, 4)
    with session() as workers:
        engines = (NOTHING, OURS_MEMORY, OURS_CODEC, PEER)
        lanes = {lane.engine: lane for lane in workers.lanes(NUM_BYTES, 32, engines)}
        num_products = workers.products(STEP_S)
        for lane in lanes.values():
            lane.ask("train", num_steps=1, every=1, num_products=1)
        every_step = _every_step(lanes, num_products, num_blocks)
        seconds = _segments(lanes, num_products, num_rounds)
        workers.close()
    return [*_memory_rows(*every_step), *_disk_rows(seconds)]


def _every_step(lanes: Mapping[str, Lane], num_products: int, num_blocks: int) -> tuple[Shares, Shares]:
    """Return how much longer blocks are that save every step, and (the control) that do not either."""

    def block(engine: str) -> Mapping[str, float]:
        options = {"num_steps": BLOCK_STEPS, "every": 1, "num_products": num_products}
        trained: Mapping[str, float] = lanes[engine].ask("train", **options)
        return trained

    saving: dict[str, list[float]] = defaultdict(list)
    control: dict[str, list[float]] = defaultdict(list)
    for number in range(num_blocks):
        before, between, after = (block(engine) for engine in (NOTHING, OURS_MEMORY, NOTHING))
        for clock in _CLOCKS:
            saving[clock].append(2 * between[clock] / (before[clock] + after[clock]) - 1)
            first, second = (before, after) if number % 2 else (after, before)
            control[clock].append(first[clock] / second[clock] - 1)
    return saving, control


def _segments(
    lanes: Mapping[str, Lane], num_products: int, num_rounds: int
) -> Mapping[tuple[str, str], list[float]]:
    """Return the seconds of the long segments, by name and clock."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def segment(name: str, engine: str, every: int) -> None:
        if engine in lanes:
            lanes[engine].ask("warm")
            options = {"num_steps": DISK_EVERY, "every": every, "num_products": num_products}
            trained = lanes[engine].ask("train", **options)
            lanes[engine].ask("drop")
            for clock in _CLOCKS:
                seconds[name, clock].append(trained[clock])

    turns = [
        lambda: segment("first", NOTHING, 1),
        lambda: segment("disk", OURS_CODEC, DISK_EVERY),
        lambda: segment("peer", PEER, DISK_EVERY),
        lambda: segment("second", NOTHING, 1),
    ]
    rounds(num_rounds, turns)
    return seconds


def _memory_rows(saving: Shares, control: Shares) -> list[Row]:
    name = "slowdown: every step to keeper memory (0.5 GiB, steps of 0.5 s)"
    return [
        row(
            "slowdown, control: blocks without checkpoints beside each other",
            "%",
            ours=100 * median(control["wall"]),
        ),
        row("slowdown, control: standard error", "%", ours=100 * _error(control["wall"])),
        row(name, "%", ours=100 * median(saving["wall"]), goal=Goal("<=", 2.0)),
        row(f"{name}: standard error", "%", ours=100 * _error(saving["wall"])),
        row(f"{name}, CPU time of the training thread", "%", ours=100 * median(saving["cpu"])),
    ]


def _error(shares: Sequence[float]) -> float:
    """Return the standard error of a median, as far as the shares are spread normally."""
    lower, _, upper = quantiles(shares, n=4)
    return 1.2533 * (upper - lower) / 1.349 / math.sqrt(len(shares))


def _disk_rows(seconds: Mapping[tuple[str, str], list[float]]) -> list[Row]:
    def percent(name: str, clock: str = "wall") -> float:
        around = zip(seconds["first", clock], seconds["second", clock], strict=True)
        return 100 * median(
            2 * mine / (first + second) - 1
            for mine, (first, second) in zip(seconds[name, clock], around, strict=True)
        )

    walls = zip(seconds["first", "wall"], seconds["second", "wall"], strict=True)
    noise = max(abs(first / second - 1) for first, second in walls)
    peers = {PEER: percent("peer")} if ("peer", "wall") in seconds else {}
    disk = "slowdown: every 10 steps to disk, codec on (0.5 GiB, steps of 0.5 s)"
    return [
        row("slowdown, control: two equal segments without checkpoints differ by", "%", ours=100 * noise),
        row(disk, "%", ours=percent("disk"), peers=peers, goal=Goal("<=", 5.0)),
        row(f"{disk}, CPU time of the training thread", "%", ours=percent("disk", "cpu")),
    ]
