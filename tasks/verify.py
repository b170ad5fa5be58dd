"""Prove a run's newest checkpoint: every chunk read back, and the weights in it those that were trained."""

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

import checkpoint
import elastic
from tasks.errors import Unverified
from tasks.jobs import make_importable
from tasks.runs import Run
from tasks.telling import say

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint that was read back whole; `weights_sha256` is that of the model made from it."""

    step: int
    weights_sha256: str


@task(
    name="verify",
    task_run_name="verify {run.name}",
    retries=1,
    retry_delay_seconds=5,
    timeout_seconds=7200,
    cache_policy=NO_CACHE,
)
def verify(run: Run) -> Verified:
    """Read the newest checkpoint back and compare its weights with the trained ones. Raises Unverified."""
    store = checkpoint.open_store(run.store_url)
    trained = elastic.read_report(run.directory)
    step = checkpoint.Catalog(store).latest()
    if step is None or step < trained.committed_steps:
        raise Unverified(
            f"the newest checkpoint of run {run.name} is of step {step}, "
            f"but {trained.committed_steps} steps were trained; continue with `holdfast resume {run.name}`"
        )
    check_content(store, step, run.store_url)
    sha256 = _weights_of(run, store, step)
    if trained.weights_sha256 is not None and sha256 != trained.weights_sha256:
        raise Unverified(
            f"the weights in the checkpoint of step {step} ({sha256}) are not the trained ones "
            f"({trained.weights_sha256}); do not use it, and report this as an error in Holdfast"
        )
    say("verify", f"step {step} was read back whole; sha256 of the weights {sha256}")
    return Verified(step, sha256)


def check_content(store: checkpoint.Store, step: int, where: str) -> None:
    """Read every chunk of a checkpoint back. Raises Unverified with the bad items' names."""
    findings = checkpoint.verify(store, step)
    if not findings.is_sound:
        raise Unverified(f"the checkpoint of step {step} in {where} is damaged: {spell_damage(findings)}")


def spell_damage(findings: checkpoint.VerifyReport) -> str:
    """Name the first few items that are not as they were written."""
    named = "; ".join(f"{bad.item}: {bad.why}" for bad in findings.bad[:_MAX_NAMED])
    return named if findings.num_bad <= _MAX_NAMED else f"{named}; and {findings.num_bad - _MAX_NAMED} more"


def _weights_of(run: Run, store: checkpoint.Store, step: int) -> str:
    make_importable(run.spec)
    state = checkpoint.load(store, step).state
    return elastic.weights_sha256(elastic.model_from_state(run.spec.job.path, run.spec.job.settings, state))
