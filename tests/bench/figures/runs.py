"""Our runs with one failure: a driver in its own process, a blow to the last worker, and the journal read."""

import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import Any

import elastic
from tests.bench.figures.session import ROOT
from tests.bench.peers.default_job import GLOBAL_BATCH, VIRTUAL_RANKS, Course
from tests.bench.peers.nodes import kill_all, node_of, nodes
from tests.fault.elastic_churn import Story
from tests.integration.drivers import driving
from tests.orders import local_order

WORKERS = 4
ENDLESS = 1_000_000
POLL_S = 0.005
TIMEOUT_S = 200


class Blow(Enum):
    """What happens to the last worker."""

    KILL = "kill"
    KILL_BESIDE_A_STANDBY = "kill beside a standby"
    STOP = "stop"
    NODE = "node lost"


@dataclass(frozen=True, slots=True)
class Recovery:
    """A run with one failure, in seconds from the blow: to the next committed step, and to the first one of a
    world as large as before.

    `detect_s` is until the first evidence of the failure; `know_s` and `leave_s` count from there, until all
    survivors knew of it and until all had left the broken world; `regroup_s` from then to the new group.
    `step_s` is a step's usual time.
    """

    next_step_s: float
    full_strength_s: float
    detect_s: float
    know_s: float
    leave_s: float
    regroup_s: float
    step_s: float
    redone_steps: int


def recover(run_dir: Path, blow: Blow) -> Recovery:
    """Train, strike once the step of the kill is committed, and stop once what is asked for is measured."""
    run_dir.mkdir(parents=True)
    story, course = Story(run_dir), Course(run_dir)
    standbys = int(blow is Blow.KILL_BESIDE_A_STANDBY)
    comes_back = blow in (Blow.KILL, Blow.KILL_BESIDE_A_STANDBY)
    with ExitStack() as stack:
        address = stack.enter_context(nodes(WORKERS)) if blow is Blow.NODE else None
        driver = stack.enter_context(driving(run_dir))(_order(course, standbys, address))
        while story.steps < course.kill_step or len(story.pids) < WORKERS + standbys:
            _wait(story, driver)
        struck_at = _strike(story.pids[story.last], blow)
        while _first_step_at(story, WORKERS if comes_back else 1) == inf:
            _wait(story, driver)
        driver.terminate()
        driver.wait(timeout=TIMEOUT_S)
        story.update()
        return measured(story, struck_at)


def _wait(story: Story, driver: Popen[bytes]) -> None:
    """Let a moment pass, and see what happened. Raises RuntimeError if the driver is gone or stuck."""
    time.sleep(POLL_S)
    story.update()
    is_stuck = story.moments and time.monotonic() - story.moments[-1]["t"] > TIMEOUT_S
    if driver.poll() is not None or is_stuck:
        raise RuntimeError(f"{story.run_dir.name} got nowhere after {story.moments[-3:]}")


def _strike(pid: int, blow: Blow) -> float:
    """Strike; return when."""
    victims = node_of(pid) if blow is Blow.NODE else {pid}
    struck_at = time.monotonic()
    if blow is Blow.STOP:
        os.kill(pid, signal.SIGSTOP)
    else:
        kill_all(victims)
    return struck_at


def measured(story: Story, struck_at: float) -> Recovery:
    """Read from a run's journal how it went on after its first world was struck."""
    survivors = set(_of(story, "FormWorld")[0]["members"]) & set(_of(story, "FormWorld")[1]["members"])
    knew, left = (
        _first(story, survivors, "WorldBroken", "WorldCalledOff"),
        _first(story, survivors, "WorldBroken"),
    )
    lost_at = min(each["t"] for each in story.moments if each["kind"] in ("MemberLost", "KillMember"))
    first = min(lost_at, *knew.values())
    formed = [each["t"] for each in _of(story, "WorldFormed") if each["generation"] == 2]
    usual = [each["seconds"] for each in _of(story, "StepCommitted") if each["generation"] == 1]
    return Recovery(
        next_step_s=_first_step_at(story, 1) - struck_at,
        full_strength_s=_first_step_at(story, WORKERS) - struck_at,
        detect_s=first - struck_at,
        know_s=max(knew.values()) - first,
        leave_s=max(left.values()) - first,
        regroup_s=max(formed) - max(left.values()),
        step_s=median(usual),
        redone_steps=elastic.read_report(story.run_dir).redone_steps,
    )


def _first_step_at(story: Story, size: int) -> float:
    """When the first step of a world of this size or larger was committed, after the first; inf: never."""
    sizes = {each["generation"]: len(each["members"]) for each in _of(story, "FormWorld")}
    steps = (each for each in _of(story, "StepCommitted") if each["generation"] > 1)
    return min((each["t"] for each in steps if sizes[each["generation"]] >= size), default=inf)


def _first(story: Story, members: set[str], *kinds: str) -> dict[str, float]:
    """When each of these members first told one of these of the first world."""
    told: dict[str, float] = {}
    for each in story.moments:
        if each["kind"] in kinds and each["generation"] == 1 and each["member"] in members:
            told.setdefault(each["member"], each["t"])
    return told


def _of(story: Story, kind: str) -> list[dict[str, Any]]:
    return [each for each in story.moments if each["kind"] == kind]


def _order(course: Course, standbys: int, address: str | None) -> elastic.TrainOrder:
    order = local_order(
        course.directory,
        elastic.JobOrder(path="elastic.training.gpt:GPTJob", settings={}, source="stdlib", code_dir=ROOT),
        training=elastic.TrainingOrder(
            num_steps=ENDLESS,
            global_batch=GLOBAL_BATCH,
            virtual_ranks=VIRTUAL_RANKS,
            seed=0,
            determinism="bitwise",
            grad_clip=1.0,
        ),
        world=elastic.WorldPolicy(workers=WORKERS, standbys=standbys),
        every_steps=course.every,
        arena_mib=512,
    )
    return replace(order, cluster=elastic.ClusterOrder(address=address))
