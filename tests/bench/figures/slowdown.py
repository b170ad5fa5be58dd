"""What checkpoints cost a whole run: wall time of the same steps with and without them, segments in turn."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from tests.bench.figures.session import GIB, OURS_CODEC, OURS_MEMORY, Session, rounds, session
from tests.bench.harness import Effort, Goal, Row, row

NOTHING = "nothing"
PEER = "dcp.async_save, reused stager"
NUM_BYTES, STEP_S = GIB // 2, 0.5
DISK_EVERY = 10


def slowdown(effort: Effort) -> list[Row]:
    """Measure every step to keeper memory, and every tenth to disk with the default codec.

    Each round's segments are compared with the mean of that round's two without checkpoints (one in the
    trainer that is ours, around the others), so that a machine that slows down slows all of them down.
    """
    with session() as workers:
        return _measure(workers, 1 if effort is Effort.QUICK else 4)


def _measure(workers: Session, num_rounds: int) -> list[Row]:
    lanes = {
        lane.engine: lane for lane in workers.lanes(NUM_BYTES, 32, (NOTHING, OURS_MEMORY, OURS_CODEC, PEER))
    }
    num_products = workers.products(STEP_S)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def segment(name: str, engine: str, every: int) -> None:
        if engine in lanes:
            lanes[engine].ask("warm")
            options = {"num_steps": DISK_EVERY, "every": every, "num_products": num_products}
            trained = lanes[engine].ask("train", **options)
            lanes[engine].ask("drop")
            for clock in ("wall", "cpu"):
                seconds[name, clock].append(trained[clock])

    turns = [
        lambda: segment("first", NOTHING, 1),
        lambda: segment("memory", OURS_MEMORY, 1),
        lambda: segment("disk", OURS_CODEC, DISK_EVERY),
        lambda: segment("peer", PEER, DISK_EVERY),
        lambda: segment("second", NOTHING, 1),
    ]
    for lane in lanes.values():
        lane.ask("train", num_steps=1, every=1, num_products=1)
    rounds(num_rounds, turns)
    workers.close()
    return _rows(seconds)


def _rows(seconds: Mapping[tuple[str, str], list[float]]) -> list[Row]:
    def percent(name: str, clock: str = "wall") -> float:
        around = zip(seconds["first", clock], seconds["second", clock], strict=True)
        return 100 * median(
            2 * mine / (first + second) - 1
            for mine, (first, second) in zip(seconds[name, clock], around, strict=True)
        )

    walls = zip(seconds["first", "wall"], seconds["second", "wall"], strict=True)
    noise = max(abs(first / second - 1) for first, second in walls)
    peers = {PEER: percent("peer")} if ("peer", "wall") in seconds else {}
    memory = "slowdown: every step to keeper memory (0.5 GiB, steps of 0.5 s)"
    disk = "slowdown: every 10 steps to disk, codec on (0.5 GiB, steps of 0.5 s)"
    of_thread = "CPU time of the training thread"
    return [
        row("slowdown, control: two equal segments without checkpoints differ by", "%", ours=100 * noise),
        row(memory, "%", ours=percent("memory"), goal=Goal("<=", 2.0)),
        row(f"{memory}, {of_thread}", "%", ours=percent("memory", "cpu")),
        row(disk, "%", ours=percent("disk"), peers=peers, goal=Goal("<=", 5.0)),
        row(f"{disk}, {of_thread}", "%", ours=percent("disk", "cpu")),
    ]
