"""Real churn on real Ray: members come, go, die and hang at random, and the weights do not show it."""

from pathlib import Path

import pytest

import elastic
from tests.fault.elastic_churn import Churn
from tests.fault.elastic_job import Settings
from tests.fault.elastic_orders import sized, tiny_order
from tests.integration.drivers import driving, finish

ENDLESS = 1_000_000


def churn(directory: Path, seed: int, seconds: float) -> None:
    """Run with churn, then quietly as many steps; assert that nobody could tell."""
    settings = Settings(pause_s=0.002)
    order = tiny_order(directory, "churn", settings, num_steps=ENDLESS)
    churn, at_least = Churn(order.run_dir, seed), round(seconds / 15)
    with driving(directory) as drive:
        process = drive(order)
        churn.play(seconds, at_least)
        process.terminate()
        process.wait(timeout=90)
        report = elastic.read_report(order.run_dir)
        journal = (order.run_dir / "journal.jsonl").read_text()
    told = f"seed {seed}: {churn.struck}, {churn.num_spawned} wanted more; {directory}"
    assert report.status == "stopped", told
    assert '"ReplicaHealed"' not in journal and "replicas differ" not in journal, told
    assert report.redone_steps == 0, told
    assert max(world.size for world in report.worlds) > 2, told
    assert len(churn.struck) >= at_least, told
    quiet = tiny_order(directory, "quiet", Settings(), num_steps=report.committed_steps)
    assert finish(sized(quiet, 1)).weights_sha256 == report.weights_sha256, told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_kills_hangs_and_newcomers_cannot_be_told_from_the_weights(tmp_path: Path) -> None:
    churn(tmp_path, seed=1, seconds=60.0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [2])
def test_ten_minutes_of_kills_hangs_and_newcomers_cannot_be_told_from_the_weights(
    tmp_path: Path, seed: int
) -> None:
    churn(tmp_path, seed=seed, seconds=600.0)
