"""A node that is lost with its keeper, on real Ray: what only it held is rebuilt from its peers' memory."""

import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import elastic
from checkpoint import KeeperConfig, Parity, PeerSource, connect
from tests.fault import elastic_job
from tests.fault.elastic_churn import Story
from tests.fault.elastic_job import Settings
from tests.fault.elastic_orders import sized, tiny_order
from tests.integration.drivers import Drive, finish
from tests.integration.test_hand_over import ENDLESS, cluster, drive, until

__all__ = ["cluster", "drive"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EVERY = 60


def keeper_of(order: elastic.TrainOrder, host: str) -> KeeperConfig:
    """Return the settings of a run's keeper, by which it is found."""
    return KeeperConfig(
        run=order.run,
        host=host,
        store_url=order.checkpoint.store_url,
        arena_bytes=order.checkpoint.arena_bytes,
        lease_s=order.lease_s,
        hold=order.checkpoint.hold,
    )


def kill_keeper(order: elastic.TrainOrder, host: str) -> None:
    """SIGKILL a run's keeper."""
    os.kill(int((keeper_of(order, host).home / "life.lock").read_text()), signal.SIGKILL)


def steps_without(order: elastic.TrainOrder, host: str, lost: str) -> list[int]:
    """List the steps that a host could restore from memories alone if another one was lost now."""
    with connect(keeper_of(order, host)) as keeper:
        source = PeerSource({name: at for name, at in keeper.peers().items() if name != lost}, host)
    try:
        return source.steps()
    finally:
        source.close()


@pytest.fixture
def order(tmp_path: Path, cluster: Any) -> elastic.TrainOrder:
    """A run of three nodes, each of which holds rows that no other one has."""
    shutil.copy(elastic_job.__file__, tmp_path / "doomed.py")
    tiny = sized(tiny_order(tmp_path, "rows", Settings(pause_s=0.015), num_steps=ENDLESS), 3)
    return replace(
        tiny,
        job=replace(tiny.job, path="doomed:DoomedJob", code_dir=tmp_path),
        training=replace(tiny.training, parameter_copies=1),
        cluster=elastic.ClusterOrder(address=cluster.address),
        checkpoint=replace(tiny.checkpoint, every_steps=EVERY, hold=1, parity=Parity(3, 1)),
    )


def test_rows_that_only_a_lost_node_held_are_rebuilt_from_its_peers_memory_and_no_store_is_read(
    tmp_path: Path, drive: Drive, cluster: Any, order: elastic.TrainOrder
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    story = Story(order.run_dir)
    driver = drive(order)
    until(story, "a world of three", lambda: len(story.holders) == 3)
    victim = sorted(story.holders)[-1]
    host, own = story.hosts[victim], story.hosts[min(story.holders)]
    node = next(each for each in nodes if each.node_id.startswith(host))
    until(story, "a snapshot", lambda: story.steps > EVERY)
    until(story, "it is protected", lambda: EVERY in steps_without(order, own, host))
    kill_keeper(order, host)
    cluster.remove_node(node, allow_graceful=False)
    until(story, "the loss is known", lambda: victim in story.gone)
    until(story, "a world without it", lambda: victim not in story.holders and story.newest_settled)
    settled = [each for each in story.moments if each["kind"] == "Settled"]
    restored = [each for each in settled if "parity" in each["source"]]
    lost = story.steps
    until(story, "steps that were not committed before", lambda: story.steps > lost + 5)
    driver.terminate()
    driver.wait(timeout=60)
    for survivors in set(story.hosts.values()) - {host}:
        with suppress(FileNotFoundError, ProcessLookupError):
            kill_keeper(order, survivors)  # it would stay for a lease
    notes = {each["note"] for each in restored}
    assert {each["step"] for each in restored} == {EVERY}, restored
    assert {each["source"] for each in restored} <= {"memory+parity", "memory+peers+parity"}, restored
    assert all("from parity" in note for note in notes), notes
    report = elastic.read_report(order.run_dir)
    assert report.failures[0].member == victim
    quiet = tiny_order(tmp_path, "quiet", Settings(), num_steps=report.committed_steps)
    assert finish(sized(quiet, 1)).weights_sha256 == report.weights_sha256
