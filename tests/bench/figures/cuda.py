"""The same on a CUDA device, where there is one: blocked time, step time, bytes to the host."""

from collections import defaultdict
from functools import partial
from statistics import median

import torch

from tests.bench.figures.session import GIB, OURS, PEERS, Lane, Session, console, rounds, session
from tests.bench.harness import Effort, Goal, Row, row

_STEP_S_PER_GIB = 1.0  # long enough for the disk to follow
_NUM_STEPS = 2


def cuda(effort: Effort) -> list[Row]:
    """Measure 1 GiB, and 8 GiB (FULL), of state on the device; no rows, and a word, where there is none."""
    if not torch.cuda.is_available():
        console.print("  cuda: no device here, not measured")
        return []
    rows = []
    for num_gib in (1,) if effort is Effort.QUICK else (1, 8):
        with session() as workers:
            rows += _measure(workers, num_gib, 3 if effort is Effort.FULL and num_gib == 1 else 1)
    return rows


def _measure(workers: Session, num_gib: int, num_rounds: int) -> list[Row]:
    lanes = workers.lanes(num_gib * GIB, 32, (OURS, *PEERS), "cuda")
    num_products = round(workers.ours.ask("calibrate") * _STEP_S_PER_GIB * num_gib)
    blocked: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = defaultdict(list)
    captured: dict[str, list[float]] = defaultdict(list)
    wrong: dict[str, int] = defaultdict(int)

    def turn(lane: Lane) -> None:
        work = {"num_steps": _NUM_STEPS, "every": 1, "num_products": num_products}
        trained = lane.ask("train", **work, warm_bytes=num_gib * GIB)
        blocked[lane.engine] += trained["blocked"]
        steps[lane.engine].append(trained["wall"] / _NUM_STEPS)
        wrong[lane.engine] += not lane.ask("restore")["is_equal"]
        captured[lane.engine] += lane.ask("train", num_steps=1, every=1, num_products=0)["blocked"]
        lane.ask("drop")

    def plain() -> None:
        trained = workers.ours.ask(
            "train", engine="nothing", num_steps=_NUM_STEPS, every=1, num_products=num_products
        )
        steps["nothing"].append(trained["wall"] / _NUM_STEPS)

    workers.ours.ask("open", engine="nothing", arena_bytes=0)
    for lane in lanes:
        lane.ask("train", num_steps=1, every=1, num_products=1)
    rounds(num_rounds, [*(partial(turn, lane) for lane in lanes), plain])
    workers.close()
    name = f"CUDA, {num_gib} GiB ({torch.cuda.get_device_name()})"
    blocked_ms = {engine: 1e3 * median(each) for engine, each in blocked.items()}
    slower = {engine: 100 * (median(each) / median(steps["nothing"]) - 1) for engine, each in steps.items()}
    speed = {engine: num_gib * GIB / 1e9 / median(each) for engine, each in captured.items()}
    return [
        _row(f"{name}: blocked per checkpoint, saving every step", "ms", blocked_ms),
        row(f"{name}: step without checkpoints", "ms", ours=1e3 * median(steps["nothing"])),
        _row(f"{name}: step longer than without checkpoints", "%", slower),
        row(
            f"{name}: to the host",
            "GB/s",
            ours=speed[OURS],
            peers={peer: speed[peer] for peer in PEERS if peer in speed},
            better="higher",
        ),
        row(
            f"{name}: restored checkpoints that differ from the state at save",
            "",
            ours=wrong[OURS],
            peers={peer: wrong[peer] for peer in PEERS if peer in wrong},
            goal=Goal("<=", 0),
        ),
    ]


def _row(metric: str, unit: str, figures: dict[str, float]) -> Row:
    peers = {peer: figures[peer] for peer in PEERS if peer in figures}
    return row(metric, unit, ours=figures[OURS], peers=peers)
