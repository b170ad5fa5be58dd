"""Orders of small runs to break."""

from dataclasses import asdict, replace
from pathlib import Path

import elastic
from tests.fault.elastic_job import Settings
from tests.orders import local_order

ROOT = Path(__file__).parents[2]


def tiny_order(root: Path, name: str, settings: Settings, *, num_steps: int) -> elastic.TrainOrder:
    """A run of a tiny job, whose replicas are compared at every step."""
    return local_order(
        root / name,
        elastic.JobOrder(
            path="tests.fault.elastic_job:DoomedJob", settings=asdict(settings), source="noise", code_dir=ROOT
        ),
        training=elastic.TrainingOrder(
            num_steps=num_steps,
            global_batch=24,
            virtual_ranks=12,
            seed=11,
            determinism="bitwise",
            grad_clip=1.0,
            compare_every=1,
        ),
        world=elastic.WorldPolicy(workers=2, min_workers=1, max_failures=10_000),
        every_steps=50,
        arena_mib=16,
    )


def sized(order: elastic.TrainOrder, workers: int, standbys: int = 0) -> elastic.TrainOrder:
    """The same run with another number of workers."""
    return replace(order, world=replace(order.world, workers=workers, standbys=standbys))
