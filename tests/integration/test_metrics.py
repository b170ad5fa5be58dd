"""Metrics as Prometheus reads them: from the endpoint of a real Ray node."""

import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from elastic.control.events import Cause, CheckpointDurable, MemberLost, StepCommitted
from elastic.control.instructions import FormWorld, Manner
from elastic.runtime.metrics import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def endpoint() -> Iterator[str]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    finally:
        ray.shutdown()


def test_a_run_that_loses_a_worker_shows_in_the_metrics_of_its_node(endpoint: str) -> None:
    metrics = Metrics("r")
    metrics.see(FormWorld(7, ("a", "b"), ("here", "here"), Manner.AT_ONCE, "because"))
    for member in ("a", "b"):
        metrics.see(StepCommitted(member, 7, 3, 2.5, 0.5, 100, 0.01))
    metrics.see(CheckpointDurable("a", 7, 3, "store", 10, 1.0))
    metrics.see(MemberLost("b", Cause.PROCESS_DIED, "its lifeline"))
    wanted = {
        'holdfast_step{run="r"}': 3.0,
        'holdfast_tokens_per_s{run="r"}': 200.0,
        'holdfast_world_size{run="r"}': 2.0,
        'holdfast_durable_step{run="r",tier="store"}': 3.0,
        'holdfast_members_lost_total{cause="process died",run="r"}': 1.0,
        'holdfast_step_seconds_count{run="r"}': 1.0,
    }
    found: dict[str, float] = {}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not wanted.items() <= found.items():
        time.sleep(0.5)  # the node reports every few seconds
        found = shown(endpoint)
    assert {name: found.get(name) for name in wanted} == wanted


def shown(endpoint: str) -> dict[str, float]:
    """Return our metrics by name and tags of our own."""
    try:
        with urllib.request.urlopen(endpoint, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        if line.startswith("ray_holdfast_"):
            name, _, rest = line.removeprefix("ray_").partition("{")
            tags, _, value = rest.rpartition("} ")
            ours = [tag for tag in tags.split(",") if tag.partition("=")[0] in {"run", "tier", "cause"}]
            found[f"{name}{{{','.join(sorted(ours))}}}"] = float(value)
    return found
