"""How many GPUs a run's own Ray has: as many as its workers and standbys take, if the machine has them."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import elastic
from elastic.runtime.local_ray import choose_num_gpus
from tests.orders import local_order


def order(gpus_per_worker: float, workers: int, standbys: int = 0) -> elastic.TrainOrder:
    given = local_order(
        Path("run"),
        elastic.JobOrder(path="x:Job", settings={}, source="x", code_dir=Path()),
        training=elastic.TrainingOrder(
            num_steps=1, global_batch=4, virtual_ranks=4, seed=1, determinism="bitwise", grad_clip=None
        ),
        world=elastic.WorldPolicy(workers=workers, standbys=standbys),
        every_steps=1,
        arena_mib=1,
    )
    return replace(given, cluster=elastic.ClusterOrder(gpus_per_worker=gpus_per_worker))


@pytest.mark.parametrize(
    ("gpus_per_worker", "workers", "standbys", "num_gpus"),
    [
        (0.0, 4, 1, 0),
        (1.0, 2, 1, 3),
        (2.0, 2, 1, 6),
        (0.5, 5, 0, 3),
        (0.5, 3, 1, 2),
        (0.4, 5, 0, 3),  # two to a GPU, whatever is left of it
        (0.1, 10, 1, 2),
    ],
)
def test_every_worker_and_standby_finds_room(gpus_per_worker, workers, standbys, num_gpus):
    assert choose_num_gpus(order(gpus_per_worker, workers, standbys), num_here=8) == num_gpus


def test_a_machine_with_fewer_gpus_is_named_and_no_worker_is_put_on_one_that_is_not_there(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_num_gpus(order(1.0, 3, 1), num_here=2) == 2
    assert "3 workers and 1 standbys take 4 GPUs" in caplog.text
    assert "this machine has 2" in caplog.text


def test_on_a_machine_without_gpus_all_workers_start_and_compute_on_its_cpu(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_num_gpus(order(0.5, 5), num_here=0) == 3
    assert "this machine has none" in caplog.text
