"""Where members run, on real Ray: copies on other nodes than their originals, also after churn."""

import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import elastic
from tests.fault import elastic_job
from tests.fault.elastic_churn import Story
from tests.fault.elastic_job import Settings
from tests.fault.elastic_orders import sized, tiny_order
from tests.integration.drivers import Drive
from tests.integration.test_hand_over import ENDLESS, cluster, drive, until

__all__ = ["cluster", "drive"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def hosts(story: Story) -> Counter[str]:
    """Count the ranks on each node."""
    return Counter(story.hosts[member] for member in story.holders - story.gone)


def test_members_go_where_none_is_when_nodes_come_and_again_when_one_dies(
    tmp_path: Path, drive: Drive, cluster: Any
) -> None:
    cluster.add_node(num_cpus=6)
    shutil.copy(elastic_job.__file__, tmp_path / "doomed.py")
    order = sized(tiny_order(tmp_path, "placed", Settings(pause_s=0.005), num_steps=ENDLESS), 2)
    order = replace(
        order,
        job=replace(order.job, path="doomed:DoomedJob", code_dir=tmp_path),
        training=replace(order.training, parameter_copies=2),
        cluster=elastic.ClusterOrder(address=cluster.address),
    )
    story = Story(order.run_dir)
    driver = drive(order)
    until(story, "a world of two", lambda: len(story.holders) == 2)
    assert set(hosts(story).values()) == {2}
    for _ in range(2):
        cluster.add_node(num_cpus=3)
    elastic.resize(order.run_dir, 4)
    until(story, "a world of four", lambda: hosts(story).total() == 4)
    placed = hosts(story)
    assert sorted(placed.values()) == [1, 1, 2]
    alone = next(one for one in story.holders if placed[story.hosts[one]] == 1)
    os.kill(story.pids[alone], signal.SIGKILL)
    until(story, "it is lost", lambda: hosts(story).total() == 3)
    until(story, "a replacement", lambda: hosts(story).total() == 4)
    assert hosts(story) == placed
    driver.terminate()
    driver.wait(timeout=60)
    assert elastic.read_report(order.run_dir).redone_steps == 0
