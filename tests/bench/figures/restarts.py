"""How the peers come back after a kill: each runs the default job in its own processes; its log is read.

torchrun needs nothing but torch; torchft and Ray Train are missing without the peers' environment.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.bench.figures.session import PEERS_PYTHON, ROOT, console
from tests.bench.peers.default_job import Course

TIMEOUT_S = 400
_LOG_TAIL = 2000
# Ray Train looks after its workers every 2 s by default. That it waits 60 s for a worker that no node has
# room for is left as it is: a user who cuts it forgoes the workers that a cluster starts nodes for.
_RAY_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
# Without it torchrun's survivors never come back (the agent's store is shared with the dead rank).
_TORCHRUN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True, slots=True)
class Restart:
    """Kill to the first step after it, to the first step never made before, and how many were made twice."""

    next_step_s: float
    new_progress_s: float
    redone_steps: int


Peer = Callable[[Path], Restart]


def torchrun(course: Course) -> Restart:
    """Run an agent that restarts all workers from the newest file."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    job = ["--max-restarts=3", "-m", "tests.bench.peers.torchrun_job", course.written()]
    return _restart([*agent, *job], _TORCHRUN, course)


def torchft(course: Course, timeout_s: float) -> Restart:
    """Run one replica group a worker; nobody starts the killed one again."""
    command = [str(PEERS_PYTHON), "-m", "tests.bench.peers.torchft_job", course.written(), str(timeout_s)]
    return _restart(command, {}, course)


def ray_train(course: Course, victim: Literal["process", "node"]) -> Restart:
    """Run a trainer that starts its whole worker group anew."""
    command = [str(PEERS_PYTHON), "-m", "tests.bench.peers.ray_train_job", course.written(), victim]
    return _restart(command, _RAY_TRAIN, course)


def peers_of_a_kill() -> Mapping[str, Peer]:
    """Return who can do what we do when a worker is killed, as far as they are installed."""
    here: dict[str, Peer] = {"torchrun": lambda directory: torchrun(Course(directory))}
    there: dict[str, Peer] = {
        "Ray Train": lambda directory: ray_train(Course(directory), "process"),
        "torchft": lambda directory: torchft(Course(directory), 5),
        "torchft, timeouts 1 s": lambda directory: torchft(Course(directory), 1),
    }
    return here | (there if is_there("torchft", "ray") else {})


def peers_of_a_lost_node() -> Mapping[str, Peer]:
    """Return who goes on without a lost node: who can, shrinks."""
    course = replace(
        Course(Path()), num_steps=20
    )  # the others make steps while the node's processes are found
    there: dict[str, Peer] = {
        "Ray Train": lambda directory: ray_train(replace(course, directory=directory), "node")
    }
    return there if is_there("ray") else {}


def is_there(*packages: str) -> bool:
    """Whether the peers' environment has these packages; says so if not."""
    command = [str(PEERS_PYTHON), "-c", f"import {', '.join(packages)}"]
    found = PEERS_PYTHON.exists() and not subprocess.run(command, check=False, capture_output=True).returncode
    if not found:
        console.print(f"without {', '.join(packages)} (`make bench-peers` installs them)")
    return found


def _restart(command: Sequence[str], variables: Mapping[str, str], course: Course) -> Restart:
    course.directory.mkdir(parents=True)
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = course.directory / "output"
    with output.open("wb") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=TIMEOUT_S, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{command[-3:]} ended with {done.returncode}:\n{output.read_text()[-_LOG_TAIL:]}")
    return read_restart(course)


def read_restart(course: Course) -> Restart:
    """Read from a peer's log how it came back."""
    lines = [json.loads(line) for line in course.log.read_text().splitlines()]
    killed_at = next(line["time"] for line in lines if line["what"] == "kill")
    # By life, not by time: a survivor may write down the step of the kill just after it.
    after = [line for line in lines if line["what"] == "step" and line["life"] > 0]
    again = {line["step"] for line in after if line["step"] <= course.kill_step}
    return Restart(
        next_step_s=min(line["time"] for line in after) - killed_at,
        new_progress_s=min(line["time"] for line in after if line["step"] > course.kill_step) - killed_at,
        redone_steps=len(again),
    )
