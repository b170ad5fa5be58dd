"""Metrics as Prometheus reads them: from the endpoint of a real Ray node."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def endpoint() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.integration.metrics_node"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        yield next(line.strip() for line in node.stdout if line.startswith("http"))
        node.communicate(timeout=60)


def test_a_run_that_loses_a_worker_shows_in_the_metrics_of_its_node(endpoint: str) -> None:
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
