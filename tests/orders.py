"""An order of a run of one's own: on a local Ray, with a store in the run's directory."""

from pathlib import Path

import elastic
from checkpoint import SavePolicy


def local_order(
    run_dir: Path,
    job: elastic.JobOrder,
    *,
    training: elastic.TrainingOrder,
    world: elastic.WorldPolicy,
    every_steps: int,
    arena_mib: int,
) -> elastic.TrainOrder:
    """Order a run that is called like its directory, and saves every so many steps."""
    return elastic.TrainOrder(
        run=run_dir.name,
        run_dir=run_dir,
        spec_digest="0" * 32,
        job=job,
        training=training,
        world=world,
        cluster=elastic.ClusterOrder(),
        checkpoint=elastic.CheckpointOrder(
            store_url=f"file://{run_dir / 'store'}",
            every_steps=every_steps,
            keep_latest=3,
            keep_every=None,
            save=SavePolicy(),
            arena_bytes=arena_mib << 20,
        ),
        lease_s=20.0,
    )


def unasked_order(run_dir: Path) -> elastic.TrainOrder:
    """Order a run of which only the place matters."""
    return local_order(
        run_dir,
        elastic.JobOrder(path="tests.jobs:Job", settings={}, source="x", code_dir=run_dir),
        training=elastic.TrainingOrder(
            num_steps=9, global_batch=4, virtual_ranks=4, seed=1, determinism="bitwise", grad_clip=None
        ),
        world=elastic.WorldPolicy(workers=2),
        every_steps=3,
        arena_mib=1,
    )
