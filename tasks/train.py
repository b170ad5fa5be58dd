"""Train a run to its end, whatever state it is in; what happens is told to Prefect as it happens."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

import checkpoint
import elastic
from tasks.errors import TaskError
from tasks.jobs import make_importable
from tasks.order import to_order
from tasks.runs import Run
from tasks.telling import Herald

# A person has to mend these; anything else may be a lost cluster, which the next attempt finds or starts.
_HOPELESS = (elastic.ElasticError, checkpoint.CheckpointError, TaskError)


def _may_be_retried(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, checkpoint.StoreUnavailable) or not isinstance(failure, _HOPELESS)


@task(
    name="train",
    task_run_name="train {run.name}",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_may_be_retried,
    cache_policy=NO_CACHE,
)
def train(run: Run) -> elastic.TrainReport:
    """Train the run to its end, from wherever it is: new, without its driver, or stopped.

    No limit on its time: the driver finds workers that hang. Raises TrainingFailed, JobRejected or Fenced.
    """
    make_importable(run.spec)
    return elastic.train(to_order(run), Herald(run.name))
