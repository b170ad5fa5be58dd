"""A drill: break something on purpose, and report the recovery."""

from prefect import flow

from flows.training import training
from tasks.report import report_recovery
from tasks.spec import RunSpec, with_drill


@flow(name="drill")
def drill(spec: RunSpec, name: str | None = None) -> str:
    """Run a training in which workers are killed on purpose, and report how it came back.

    Args:
        spec: The run. If its drill names no fault, one worker is killed a third of the way.
        name: The run's name, which must be free. Empty: one is made.
    """
    run = training(with_drill(spec), name)
    report_recovery(run, spec.pipeline.runs_dir)
    return run
