"""What a failure costs: a killed and a silent worker, with and without a standby; and what elasticity costs
while nothing fails.

Four workers train the default job; the victim is a worker's process, at a step that no checkpoint holds. The
peer that restarts is torchrun on the same job (see bench_pipeline), the one that computes is torch DDP.
Rounds are interleaved; figures are medians.
"""

import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import elastic
from checkpoint import SavePolicy
from tests.bench.bench_pipeline import KILL_STEP, torchrun
from tests.bench.figures.steady import overlap, shrunken, steady, straggler
from tests.bench.harness import Effort, Goal, Row, row
from tests.fault.elastic_churn import Story

ROOT = Path(__file__).parents[2]
WORKERS, NUM_STEPS = 4, KILL_STEP + 15
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Recovery:
    """One run with one failure: its span, a step's usual time, and when survivors knew and regrouped."""

    span: elastic.FailureSpan
    step_s: float
    next_step_s: float
    know_s: float
    regroup_s: float


def run(effort: Effort) -> list[Row]:
    """Measure recoveries in turn with torchrun's, then steps."""
    rounds = 1 if effort is Effort.QUICK else 5
    killed, warm, stopped, peer = [], [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            killed.append(_recovery(root / "killed", signal.SIGKILL, standbys=0))
            warm.append(_recovery(root / "warm", signal.SIGKILL, standbys=1))
            stopped.append(_recovery(root / "stopped", signal.SIGSTOP, standbys=0))
            peer.append(torchrun(root))
    step_s = median(each.step_s for each in [*killed, *warm, *stopped])
    return [
        *_killed_rows(killed, median(each.next_step_s for each in peer), step_s),
        *_others_rows(warm, stopped, median(each.next_step_s for each in peer), step_s),
        row(
            "committed steps computed again",
            "steps",
            ours=max(each.span.redone_steps for each in [*killed, *warm, *stopped]),
            peers={"torchrun": median(each.redone_steps for each in peer)},
            goal=Goal("<=", 0),
        ),
        *(each for figure in (steady, overlap, straggler, shrunken) for each in figure(effort)),
    ]


def _killed_rows(killed: list[Recovery], peer_s: float, step_s: float) -> list[Row]:
    next_s = median(each.next_step_s for each in killed)
    return [
        row("step of the default job, world of 4 on Ray", "s", ours=step_s),
        row(
            "kill -> next committed step",
            "s",
            ours=next_s,
            peers={"torchrun": peer_s},
            goal=Goal("<=", 1 / 7, of="ratio"),
        ),
        row("the same, against 0.3 s + 1.5 steps", "s", ours=next_s, goal=Goal("<=", 0.3 + 1.5 * step_s)),
        row(
            "first survivor's error -> all have left (each ends its micro-batch)",
            "s",
            ours=median(each.know_s for each in killed),
            goal=Goal("<=", 0.1),
        ),
        row(
            "last survivor has left -> new group",
            "s",
            ours=median(each.regroup_s for each in killed),
            goal=Goal("<=", 0.2),
        ),
        row(
            "kill -> full strength, cold replacement",
            "s",
            ours=median(each.span.full_strength_s or float("inf") for each in killed),
            peers={"torchrun": peer_s},
        ),
    ]


def _others_rows(warm: list[Recovery], stopped: list[Recovery], peer_s: float, step_s: float) -> list[Row]:
    return [
        row(
            "kill -> full strength, warm standby (first step after)",
            "s",
            ours=median(each.next_step_s for each in warm),
            peers={"torchrun": peer_s},
            goal=Goal("<=", 0.5 + 1.5 * step_s),
        ),
        row(
            "SIGSTOP -> next committed step, against 5 steps + 0.3 s",
            "s",
            ours=median(each.next_step_s for each in stopped),
            goal=Goal("<=", 0.3 + 5 * step_s),
        ),
    ]


def _recovery(run_dir: Path, number: signal.Signals, *, standbys: int) -> Recovery:
    """Train, and strike the last rank once the step of the kill is committed."""
    order = _order(run_dir, standbys)
    struck: dict[str, float] = {}
    striker = threading.Thread(target=_strike, args=(run_dir, number, standbys, struck))
    striker.start()
    try:
        elastic.train(order, lambda _: None)
    finally:
        striker.join()
    return _measured(run_dir, struck["at"])


def _strike(run_dir: Path, number: signal.Signals, standbys: int, struck: dict[str, float]) -> None:
    story, deadline = Story(run_dir), time.monotonic() + 300
    while story.steps < KILL_STEP or len(story.pids) < WORKERS + standbys:
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {KILL_STEP} with {standbys} standbys was not reached in {run_dir}")
        time.sleep(POLL_S)
        story.update()
    struck["at"] = time.monotonic()
    os.kill(story.pids[story.last], number)


def _measured(run_dir: Path, struck_at: float) -> Recovery:
    story = Story(run_dir)
    story.update()
    moments = story.moments
    report = elastic.read_report(run_dir)
    broken = [each["t"] for each in _of(moments, "WorldBroken") if each["generation"] == 1]
    first = min([*broken, *(each["t"] for each in _of(moments, "MemberLost"))])
    formed = [each["t"] for each in _of(moments, "WorldFormed") if each["generation"] == 2]
    steps = [each["t"] for each in _of(moments, "StepCommitted") if each["generation"] >= 2]
    return Recovery(
        span=report.failures[0],
        step_s=median(each["seconds"] for each in _of(moments, "StepCommitted") if each["generation"] == 1),
        next_step_s=min(steps) - struck_at,
        know_s=max(broken) - first,
        regroup_s=max(formed) - max(broken),
    )


def _of(moments: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in moments if each["kind"] == kind]


def _order(run_dir: Path, standbys: int) -> elastic.TrainOrder:
    return elastic.TrainOrder(
        run=run_dir.name,
        run_dir=run_dir,
        spec_digest="0" * 32,
        job=elastic.JobOrder(path="elastic.training.gpt:GPTJob", settings={}, source="stdlib", code_dir=ROOT),
        training=elastic.TrainingOrder(
            num_steps=NUM_STEPS,
            global_batch=16,
            virtual_ranks=8,
            seed=0,
            determinism="bitwise",
            grad_clip=1.0,
        ),
        world=elastic.WorldPolicy(workers=WORKERS, standbys=standbys),
        cluster=elastic.ClusterOrder(),
        checkpoint=elastic.CheckpointOrder(
            store_url=f"file://{run_dir / 'store'}",
            every_steps=20,
            keep_latest=2,
            keep_every=None,
            save=SavePolicy(),
            arena_bytes=512 << 20,
        ),
    )
