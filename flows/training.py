"""The main road: provision, train, verify, evaluate, publish; and the way back onto it."""

from prefect import flow

from tasks.evaluate import evaluate
from tasks.provision import provision, reopen
from tasks.publish import publish
from tasks.report import reported
from tasks.runs import Run
from tasks.spec import RunSpec
from tasks.train import train
from tasks.verify import verify


@flow(name="training")
def training(spec: RunSpec, name: str | None = None) -> str:
    """Train a model through failures, and publish it once it is proven.

    Args:
        spec: Everything the run is; what is left as it stands is a small GPT on Python's standard library.
        name: The run's name, which must be free. Empty: one is made of the job, the time and four digits.
    """
    run = provision(spec, name)
    return _complete(run)


@flow(name="resume")
def resume(name: str, runs_dir: str = "runs", crashed: str = "") -> str:
    """Go on with a run that was stopped or has crashed, from its living workers or its newest checkpoint.

    Args:
        name: The run's name.
        runs_dir: Where runs have their directories.
        crashed: Filled in by the automation that answers a crash: the id of the crashed flow run.
    """
    run = reopen(name, runs_dir, crashed)
    return name if run is None else _complete(run)


def _complete(run: Run) -> str:
    with reported(run):
        train(run)
        verified = verify(run)
        scored = evaluate(run, verified.step)
        if run.spec.pipeline.publish:
            publish(run, scored)
    return run.name
