"""All flows as deployments: their forms, their schedules, the automations that bring crashed runs back."""

from datetime import timedelta
from typing import cast

import prefect
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger, EventTrigger
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import Posture
from prefect.schedules import Cron

from flows.drill import drill
from flows.evaluation import evaluation
from flows.resharding import resharding
from flows.training import resume, training
from flows.upkeep import upkeep

NIGHTLY, HOURLY = "0 3 * * *", "7 * * * *"
SILENT_RUNS = "holdfast: a run that fell silent has crashed"
# Three of a run's heartbeats, at the shortest interval that Prefect allows.
_SILENCE = timedelta(seconds=90)
_ONE_AT_A_TIME = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
# Where the crashed run's directory is: in the specification of a training, or beside the name of a resume.
_RUNS_DIR = (
    "{{ flow_run.parameters.get('spec', {}).get('pipeline', {}).get('runs_dir') "
    "or flow_run.parameters.get('runs_dir') or 'runs' }}"
)


def serve() -> None:
    """Deploy all flows to the configured server and run what is triggered or due, until interrupted."""
    register_silent_runs()
    prefect.serve(*deployments(), pause_on_shutdown=False, print_starting_message=False)


def deployments() -> list[RunnerDeployment]:
    """List the deployments, one per flow."""
    after_crash = DeploymentEventTrigger(
        name="holdfast: a crashed run is resumed",
        description="Up to recovery.max_restarts times. Runs of the command line are left to their owner.",
        expect={"prefect.flow-run.Crashed"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "deployment", "prefect.resource.name": ["train", "resume"]},
        parameters={
            "name": "{{ flow_run.name }}",
            "runs_dir": _RUNS_DIR,
            "crashed": "{{ flow_run.id | string }}",
        },
    )
    made = [
        training.to_deployment(
            "train",
            schedules=[Cron(NIGHTLY, active=False, slug="nightly", parameters={"spec": {}})],
            concurrency_limit=_ONE_AT_A_TIME,
        ),
        resume.to_deployment("resume", triggers=[after_crash]),
        drill.to_deployment("drill", concurrency_limit=_ONE_AT_A_TIME),
        evaluation.to_deployment("evaluation"),
        resharding.to_deployment("reshard"),
        upkeep.to_deployment(
            "upkeep", schedules=[Cron(HOURLY, slug="hourly")], concurrency_limit=_ONE_AT_A_TIME
        ),
    ]
    # Outside an event loop, to_deployment returns no coroutine.
    return cast(list[RunnerDeployment], made)


def register_silent_runs() -> None:
    """Let the server mark a run as crashed whose process and runner died together: nobody else is left to."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    automation = Automation(
        name=SILENT_RUNS,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat for 90 s")],
    )
    with get_client(sync_client=True) as client:
        for old in client.read_automations_by_name(SILENT_RUNS):
            client.delete_automation(old.id)
    automation.create()
