"""Upkeep: every run's store is read back and pruned."""

from prefect import flow

from tasks.upkeep import list_runs, report_upkeep, tend


@flow(name="upkeep")
def upkeep(runs_dir: str = "runs") -> None:
    """Read the newest checkpoint of every run back, and delete what the run's own policy does not keep.

    Args:
        runs_dir: Where runs have their directories.
    """
    report_upkeep([tend(run) for run in list_runs(runs_dir)])
