"""Members that are told to go, that hang, and standbys that take their place, on real Ray."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

import elastic
from tests.fault import elastic_job
from tests.fault.elastic_churn import Story
from tests.fault.elastic_job import Doom, Settings
from tests.fault.elastic_orders import sized, tiny_order
from tests.integration.drivers import Drive, drive_to_its_end, driving, finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ENDLESS = 1_000_000


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    """Start drivers as processes in sessions of their own; what is left of them is killed in the end."""
    with driving(tmp_path) as start:
        yield start


def until(story: Story, what: str, is_so: Callable[[], bool]) -> None:
    """Wait until something is so in a run's story."""
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain: {what}; {story.run_dir}"
        assert not story.has_ended, f"the run ended: {what}; {story.run_dir}"
        time.sleep(0.05)
        story.update()


def test_a_sigterm_hands_over_hangs_leave_their_stacks_and_standbys_take_the_places(
    tmp_path: Path, drive: Drive
) -> None:
    deadlock = Doom("deadlock", "in_backward", hangs=True)
    settings = Settings(pause_s=0.005, marks=str(tmp_path), dooms=(deadlock,))
    order = sized(tiny_order(tmp_path, "told", settings, num_steps=ENDLESS), 2, standbys=1)
    story = Story(order.run_dir)
    driver = drive(order)
    until(story, "a world and a standby", lambda: len(story.holders) == 2 and len(story.pids) == 3)
    told, hung = sorted(story.holders)
    os.kill(story.pids[told], signal.SIGTERM)
    until(story, "it is released", lambda: told in story.gone)
    assert len(story.holders) == 2, "the standby took its place"
    assert elastic.read_report(order.run_dir).failures == ()
    until(story, "a new standby", lambda: len(story.pids) == 4)
    os.kill(story.pids[hung], signal.SIGSTOP)
    until(story, "its stacks", (order.run_dir / "stacks" / f"{hung}.txt").exists)
    until(story, "a world without it", lambda: len(story.holders - {hung}) == 2)
    until(story, "its process ended", lambda: not psutil.pid_exists(story.pids[hung]))
    deadlock.arm(tmp_path)
    until(story, "more stacks", lambda: len(list((order.run_dir / "stacks").iterdir())) == 2)
    step = story.steps
    until(story, "steps", lambda: story.steps > step + 5)
    driver.terminate()
    driver.wait(timeout=60)
    report = elastic.read_report(order.run_dir)
    stopped, stuck = report.failures
    assert (stopped.cause, stopped.member, stopped.stacks) == ("hung", hung, f"stacks/{hung}.txt")
    assert "state T" in (order.run_dir / f"stacks/{hung}.txt").read_text()
    assert (stuck.cause, stuck.stacks) == ("hung", f"stacks/{stuck.member}.txt")
    assert "in wait_for_ever" in (order.run_dir / f"stacks/{stuck.member}.txt").read_text()
    assert report.redone_steps == 0
    quiet = tiny_order(tmp_path, "quiet", Settings(), num_steps=report.committed_steps)
    assert finish(sized(quiet, 1)).weights_sha256 == report.weights_sha256


FAST = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}


def drain(cluster: Any, node: Any) -> None:
    """Tell Ray that a node will be taken away in a minute, as a cloud's notice of preemption does."""
    command = ["drain-node", "--address", cluster.address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *command, "--deadline-remaining-seconds", "60"],
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for workers.

    Its dashboard takes any port: where another test's has the usual one, Ray forgets an open socket here.
    """
    head = {"num_cpus": 0, "dashboard_port": None, "_system_config": FAST}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def cluster_order(cluster: Any, root: Path, workers: int) -> elastic.TrainOrder:
    """Order a run of so many workers on a cluster, where its code has to travel to."""
    order = tiny_order(root, "nodes", Settings(pause_s=0.005), num_steps=ENDLESS)
    shutil.copy(elastic_job.__file__, root / "doomed.py")
    return replace(
        sized(order, workers),
        job=replace(order.job, path="doomed:DoomedJob", code_dir=root),
        cluster=elastic.ClusterOrder(address=cluster.address),
    )


def test_neither_a_drained_node_nor_a_killed_raylet_leaves_a_trace_in_the_weights(
    tmp_path: Path, drive: Drive, cluster: Any
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    order = cluster_order(cluster, tmp_path, 3)
    story = Story(order.run_dir)
    driver = drive(order)
    until(story, "a world of three", lambda: len(story.holders) == 3)
    hosts = story.hosts
    drained, killed = nodes[0], nodes[1]
    drain(cluster, drained)
    leaver = next(one for one, host in hosts.items() if drained.node_id.startswith(host))
    until(story, "the drained node's worker is released", lambda: leaver in story.gone)
    assert elastic.read_report(order.run_dir).failures == ()
    step = story.steps
    victim = next(one for one, host in hosts.items() if killed.node_id.startswith(host))
    cluster.remove_node(killed, allow_graceful=False)
    until(story, "the loss is known", lambda: victim in story.gone)
    cluster.add_node(num_cpus=1)
    until(story, "a world with a replacement", lambda: len(story.holders - {victim, leaver}) == 2)
    until(story, "steps", lambda: story.steps > step + 5)
    driver.terminate()
    driver.wait(timeout=60)
    report = elastic.read_report(order.run_dir)
    assert report.redone_steps == 0
    assert [failure.member for failure in report.failures] == [victim]
    quiet = tiny_order(tmp_path, "quiet", Settings(), num_steps=report.committed_steps)
    assert finish(sized(quiet, 1)).weights_sha256 == report.weights_sha256


def test_the_only_worker_of_a_full_cluster_makes_room_for_its_replacement_when_it_is_told_to_go(
    tmp_path: Path, drive: Drive, cluster: Any
) -> None:
    cluster.add_node(num_cpus=1)
    order = cluster_order(cluster, tmp_path, 1)
    story = Story(order.run_dir)
    driver = drive(order)
    until(story, "steps", lambda: story.steps > 5)
    os.kill(story.pids["w0"], signal.SIGTERM)
    until(story, "its replacement holds the state", lambda: story.holders == {"w1"})
    step = story.steps
    until(story, "more steps", lambda: story.steps > step + 5)
    driver.terminate()
    driver.wait(timeout=60)
    report = elastic.read_report(order.run_dir)
    assert (report.failures, report.redone_steps) == ((), 0)
    assert [world.size for world in report.worlds] == [1, 1]


def test_a_step_that_kills_whoever_computes_it_costs_no_step_before_it(tmp_path: Path) -> None:
    order = sized(tiny_order(tmp_path, "deadly", Settings(deadly_at=7), num_steps=50), 2)
    order = replace(order, world=replace(order.world, max_failures=0))
    status, said = drive_to_its_end(order)
    report = elastic.read_report(order.run_dir)
    assert (status, report.status) == (1, "failed"), said
    assert "recovery.max_failures allows fewer" in (report.reason or "")
    assert report.committed_steps == report.newest_durable_step == 7
    (failure,) = report.failures
    assert (failure.cause, failure.redone_steps) == ("process died", 0)
