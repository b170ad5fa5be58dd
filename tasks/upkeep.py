"""Look after the stores of all runs: read the newest checkpoints back, delete what no policy keeps."""

import time
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

import checkpoint
from tasks.errors import Unverified
from tasks.runs import Run, find_runs
from tasks.telling import say
from tasks.verify import spell_damage

# What a writer may still be working on is left alone for this long.
GRACE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Tended:
    """How a run's store was found: `trouble` is empty if all was well."""

    run: str
    newest_step: int | None
    pruned: tuple[int, ...]
    trouble: str


@task(name="list runs", timeout_seconds=300, cache_policy=NO_CACHE)
def list_runs(runs_dir: str) -> list[Run]:
    """List the runs whose stores are to be looked after."""
    return find_runs(Path(runs_dir))


@task(name="tend", task_run_name="tend {run.name}", timeout_seconds=3600, cache_policy=NO_CACHE)
def tend(run: Run) -> Tended:
    """Scrub a run's newest checkpoint and prune its store by the run's own policy.

    Trouble is returned, so that the other runs are tended. Nothing is deleted from a store whose newest
    checkpoint is damaged: an older one may be all that is left.
    """
    try:
        store = checkpoint.open_store(run.store_url)
        newest = checkpoint.Catalog(store).latest()
        if newest is None:
            return Tended(run.name, None, (), "")
        scrubbed = checkpoint.verify(store, newest)
        if not scrubbed.is_sound:
            return Tended(run.name, newest, (), f"step {newest} is damaged: {spell_damage(scrubbed)}")
        pruned = checkpoint.prune(store, policies(run), now_s=time.time(), grace_s=GRACE_S, run=run.name)
    except checkpoint.CheckpointError as error:
        return Tended(run.name, None, (), str(error))
    return Tended(run.name, newest, pruned.expired, "; ".join(pruned.problems))


@task(name="report upkeep", timeout_seconds=300, cache_policy=NO_CACHE)
def report_upkeep(tended: list[Tended]) -> None:
    """Show how the stores were found. Raises Unverified if one is in trouble."""
    rows = [
        {
            "run": each.run,
            "newest": "-" if each.newest_step is None else each.newest_step,
            "pruned": len(each.pruned),
            "trouble": each.trouble or "none",
        }
        for each in tended
    ]
    create_table_artifact(table=rows, key="upkeep", description=f"Stores of {len(rows)} runs")
    if troubled := [f"{each.run}: {each.trouble}" for each in tended if each.trouble]:
        raise Unverified("; ".join(troubled))
    say(
        "upkeep",
        f"{len(rows)} stores are whole; {sum(len(each.pruned) for each in tended)} checkpoints were pruned",
    )


def policies(run: Run) -> list[checkpoint.LatestN | checkpoint.EverySteps]:
    """Which checkpoints of a run are kept."""
    spec = run.spec.checkpoint
    kept: list[checkpoint.LatestN | checkpoint.EverySteps] = [checkpoint.LatestN(spec.keep_latest)]
    return kept if spec.keep_every is None else [*kept, checkpoint.EverySteps(spec.keep_every)]
