"""Make a run: choose its name, see that job, data and store can serve it, write down its specification."""

import fcntl
import secrets
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

import checkpoint
from tasks.errors import TooManyRestarts, Unusable
from tasks.files import write_whole
from tasks.jobs import check_job
from tasks.runs import Run, check_name, invent_name, open_run, refuse_taken, spec_path, store_url
from tasks.spec import RunSpec
from tasks.telling import say


@task(name="provision", timeout_seconds=300, cache_policy=NO_CACHE)
def provision(spec: RunSpec, name: str | None) -> Run:
    """Make the run's directory, once everything it needs has been seen to be there.

    A flow run that Prefect starts once more continues the run it made the first time. Raises RunExists for a
    taken name, Unusable for a store that cannot serve, and JobRejected for a job or data that cannot.
    """
    if again := _made_before(spec):
        say("provision", f"run {again.name} goes on in {again.directory}")
        return again
    name = check_name(name) if name else invent_name(spec, datetime.now(UTC), secrets.token_hex(2))
    directory = (Path(spec.pipeline.runs_dir) / name).absolute()
    refuse_taken(name, directory.parent)
    check_job(spec)
    _check_store(store_url(spec, name, directory), directory)
    _claim(directory, spec)
    name_flow_run(name)
    say("provision", f"run {name} is made in {directory}")
    return Run(name, directory, spec)


@task(name="reopen", timeout_seconds=300, cache_policy=NO_CACHE)
def reopen(name: str, runs_dir: str, crashed: str) -> Run | None:
    """Open a run that was made before, to go on with it.

    `crashed` is the id of the flow run whose crash this answers by itself; None is returned if that has been
    answered already, as Prefect may deliver an event twice. Raises NoSuchRun if there is no such run,
    TooManyRestarts if it has crashed too often.
    """
    run = open_run(name, Path(runs_dir))
    name_flow_run(name)
    if crashed and not _count_restart(run, crashed):
        say("reopen", f"the crash of flow run {crashed} has been answered already")
        return None
    say("reopen", f"run {name} goes on in {run.directory}")
    return run


def name_flow_run(name: str) -> None:
    """Give the flow run the run's name, under which the UI lists it and its successor finds it."""
    if flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=name)


def _made_before(spec: RunSpec) -> Run | None:
    """Return the run that an earlier attempt of this very flow run has made, if there is one."""
    if (flow_run.run_count or 0) < 2:
        return None
    directory = Path(spec.pipeline.runs_dir) / flow_run.name
    return open_run(flow_run.name, directory.parent) if spec_path(directory).is_file() else None


def _check_store(url: str, directory: Path) -> None:
    """See that the store can serve and is free. The run's own directory needs no proof."""
    if url == str(directory / "store"):
        return
    if url.startswith("memory:"):
        raise Unusable(
            f"{url} is the memory of one process, which workers do not share; choose another store"
        )
    store = checkpoint.open_store(url)
    probe = checkpoint.probe(store)
    if not (probe.is_writable and probe.is_readable):
        raise Unusable(
            f"{url} cannot keep checkpoints: {probe.problem}; choose another checkpoint.store or mend it"
        )
    if probe.problem:
        say("store", probe.problem)
    if steps := checkpoint.Catalog(store).steps():
        raise Unusable(
            f"the store {url} holds {len(steps)} checkpoints already, the newest of step {steps[-1]}; "
            "put {run} into checkpoint.store, to give each run a place of its own"
        )


def _claim(directory: Path, spec: RunSpec) -> None:
    """Create the run's directory; of several who try at once, one succeeds."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        refuse_taken(directory.name, directory.parent)
    except OSError as error:
        raise Unusable(
            f"cannot make {directory}: {error.strerror}; choose another pipeline.runs_dir"
        ) from error
    write_whole(spec_path(directory), (spec.model_dump_json(indent=2) + "\n").encode())


def _count_restart(run: Run, crashed: str) -> bool:
    """Count the answer to a crash, a line in the run's directory each; False if it was counted before."""
    limit = run.spec.recovery.max_restarts
    with run.restarts_path.open("a+", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.seek(0)
        answered = [line.split()[-1] for line in log]
        if crashed in answered:
            return False
        if len(answered) >= limit:
            raise TooManyRestarts(
                f"run {run.name} crashed again after {len(answered)} automatic restarts "
                f"(recovery.max_restarts = {limit}); "
                f"see its logs, then continue it with `holdfast resume {run.name}`"
            )
        log.write(f"{datetime.now(UTC).isoformat()} {crashed}\n")
    return True
