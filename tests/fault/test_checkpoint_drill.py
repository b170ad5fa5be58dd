"""SIGKILL at random moments of a run that saves every step: 20 in the suite, 200 in the soak."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.fault.checkpoint_drill import Drill, Findings

RESULTS = Path(__file__).parent / "results" / "kills.json"


@pytest.fixture
def root() -> Iterator[Path]:
    """A private directory in one: keepers enter no other."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        yield Path(directory)


def killed(root: Path, seeds: range) -> Findings:
    """Kill somebody once for every seed."""
    drill = Drill(root)
    try:
        for seed in seeds:
            drill.kill(seed)
    finally:
        drill.end()
    drill.assert_sound()
    return drill.findings


@pytest.mark.slow
def test_trainers_and_keepers_that_are_killed_at_random_moments_lose_nothing_that_was_safe(root):
    findings = killed(root, range(20))
    assert sum(findings.killed.values()) == 20 and set(findings.killed) == {"trainer", "keeper", "both"}
    assert findings.most_redone["trainer"] <= 0, "what was captured is in the keeper's memory"
    assert findings.restored_from.get("memory") and findings.restored_from.get("store")


@pytest.mark.soak
def test_two_hundred_kills_lose_nothing_that_was_safe(root):
    began_s, seeds = time.monotonic(), range(1000, 1200)
    findings = killed(root, seeds)
    assert sum(findings.killed.values()) == len(seeds)
    assert findings.most_redone["trainer"] <= 0
    result = {
        "num_kills": sum(findings.killed.values()),
        "duration_s": round(time.monotonic() - began_s, 1),
        "num_cpus": os.cpu_count(),
        **asdict(findings),
        "seeds": [seeds[0], seeds[-1]],
    }
    RESULTS.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
