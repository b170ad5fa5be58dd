"""The default job through the whole pipeline: what orchestration costs, and how fast a killed worker is done
without.

The peer is torchrun (an agent that restarts all workers from the newest file) on the same job, model and
data, its last worker SIGKILLed at the same step. Rounds are interleaved; figures are medians.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import elastic
from tests.bench.figures.restarts import torchrun
from tests.bench.harness import Effort, Goal, Row, row
from tests.bench.peers.default_job import Course

ROOT = Path(__file__).parents[2]
NUM_STEPS, KILL_STEP, EVERY = 60, 25, 20
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Ours:
    """One run of the pipeline: its wall time and its training report."""

    wall_s: float
    report: elastic.TrainReport


def run(effort: Effort) -> list[Row]:
    """Measure ours and torchrun in turn."""
    ours, peer = [], []
    for _ in range(1 if effort is Effort.QUICK else 3):
        with tempfile.TemporaryDirectory() as directory:
            ours.append(_ours(Path(directory)))
            peer.append(torchrun(Course(Path(directory) / "torchrun", KILL_STEP + 2, EVERY, KILL_STEP)))
    failures = [each.report.failures[0] for each in ours]
    step_s = median(each.report.computing_s / each.report.committed_steps for each in ours)
    total_s = median(failure.total_s or float("inf") for failure in failures)
    return [
        row(
            "kill -> next committed step",
            "s",
            ours=total_s,
            peers={"torchrun": median(each.next_step_s for each in peer)},
            goal=Goal("<=", 1 / 7, of="ratio"),
        ),
        row("the same, against 0.3 s + 1.5 steps", "s", ours=total_s, goal=Goal("<=", 0.3 + 1.5 * step_s)),
        row(
            "kill -> step never made before",
            "s",
            ours=total_s,
            peers={"torchrun": median(each.new_progress_s for each in peer)},
        ),
        row(
            "committed steps computed again",
            "steps",
            ours=median(failure.redone_steps for failure in failures),
            peers={"torchrun": median(each.redone_steps for each in peer)},
            goal=Goal("<=", 0),
        ),
        row(
            "kill -> full strength (cold replacement)",
            "s",
            ours=median(failure.full_strength_s or float("inf") for failure in failures),
            peers={"torchrun": median(each.next_step_s for each in peer)},
        ),
        *(_phase(failures, name) for name in ("detect_s", "decide_s", "form_s", "restore_s")),
        row("step time of the default job", "s", ours=step_s),
        row(
            "pipeline's own time (wall less training)",
            "s",
            ours=median(each.wall_s - each.report.wall_s for each in ours),
            goal=Goal("<=", 60.0),
        ),
        row(
            "wall time of the command", "s", ours=median(each.wall_s for each in ours), goal=Goal("<=", 180.0)
        ),
        row(
            "loop blocked per checkpoint",
            "s",
            ours=median(each.report.checkpoints.blocked_s_median or 0.0 for each in ours),
        ),
        row(
            "effective training time ratio",
            "",
            ours=median(each.report.ettr or 0.0 for each in ours),
            better="higher",
        ),
    ]


def _phase(failures: list[elastic.FailureSpan], name: str) -> Row:
    values = [getattr(failure, name) for failure in failures]
    return row(f"recovery: {name.removesuffix('_s')}", "s", ours=median(value or 0.0 for value in values))


def _ours(directory: Path) -> Ours:
    """Run the pipeline with a drill that kills the last of four workers."""
    spec = directory / "spec.toml"
    fault = f"[[drill.faults]]\nat_step = {KILL_STEP}\nrank = 3\n"
    spec.write_text(
        f"[training]\nsteps = {NUM_STEPS}\n[checkpoint]\nevery_steps = {EVERY}\n"
        f'[pipeline]\nruns_dir = "{directory / "runs"}"\n{fault}'
    )
    started = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", "train", str(spec), "--name", "bench", "--plain"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    return Ours(time.monotonic() - started, elastic.read_report(directory / "runs" / "bench"))
