"""Nodes of a Ray cluster on this machine; one is lost: its raylet and all its processes are killed."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[3]
# Three unanswered checks a second apart are a lost node: the raylet's connection tells sooner anyway.
_CHECKS = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def nodes(num_nodes: int) -> Iterator[str]:
    """Start a head without room for workers and so many nodes with room for one; yield the address."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": _CHECKS})
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        yield cluster.address
    finally:
        cluster.shutdown()


def node_of(pid: int) -> set[int]:
    """Return the raylet above a worker's process, and all that runs on its node."""
    raylet = next(each for each in psutil.Process(pid).parents() if each.name() == "raylet")
    return {each.pid for each in (raylet, *raylet.children(recursive=True))}


def kill_all(pids: set[int]) -> None:
    """Kill processes at once, those that still are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
