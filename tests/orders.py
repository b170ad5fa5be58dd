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
