"""Score one checkpoint on the validation text, beside what the frequencies of bytes alone would reach."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

import checkpoint
import elastic
from tasks.findings import Scored, read_score, write_score
from tasks.jobs import make_importable
from tasks.runs import Run, open_run
from tasks.summary import spell_score
from tasks.telling import say


@task(
    name="evaluate",
    task_run_name="evaluate {run.name} at step {step}",
    retries=1,
    retry_delay_seconds=5,
    timeout_seconds=7200,
    cache_policy=NO_CACHE,
)
def evaluate(run: Run, step: int) -> Scored:
    """Evaluate the checkpoint of this step, and keep the score in the run's directory."""
    store = checkpoint.open_store(run.store_url)
    scored = score(run, step, checkpoint.load(store, step).state)
    write_score(run, scored)
    say(
        "evaluate",
        f"step {step}: validation loss {spell_score(scored)}",
    )
    return scored


@task(name="find unscored", timeout_seconds=300, cache_policy=NO_CACHE)
def find_unscored(name: str, runs_dir: str) -> tuple[Run, list[int]]:
    """Open a run and list its committed checkpoints that have no evaluation yet, oldest first."""
    run = open_run(name, Path(runs_dir))
    steps = checkpoint.Catalog(checkpoint.open_store(run.store_url)).steps()
    return run, [step for step in steps if read_score(run, step) is None]


def score(run: Run, step: int, state: Mapping[str, Any]) -> Scored:
    """Compute the validation loss of a state; equal states give equal losses, to the last bit."""
    make_importable(run.spec)
    spec = run.spec
    evaluation = elastic.evaluate(
        spec.job.path,
        spec.job.settings,
        state,
        source=spec.data.source,
        seed=spec.training.seed,
        num_batches=spec.pipeline.evaluate_batches,
    )
    return Scored(step, evaluation.loss, evaluation.unigram, evaluation.num_tokens)
