"""Evaluation apart from training: score each committed checkpoint of a run, also while it goes on."""

from prefect import flow

from tasks.evaluate import evaluate, find_unscored


@flow(name="evaluation")
def evaluation(name: str, runs_dir: str = "runs") -> dict[int, float]:
    """Score each committed checkpoint of a run that has no score yet.

    Args:
        name: The run's name.
        runs_dir: Where runs have their directories.
    """
    run, steps = find_unscored(name, runs_dir)
    return {step: evaluate(run, step).loss for step in steps}
