"""`holdfast serve` against its real Prefect server: deployments, schedules, the form's run, a crash's end."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import checkpoint
from tasks.spec import RunSpec
from tests.conversion_samples import adam_state, bits_of, block_weights, save_state
from tests.integration.serving import eventually, serving, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("serve")) as running:
        yield running


def test_every_flow_is_deployed_with_its_schedule_and_its_limit(served):
    found = served.deployments()
    assert set(found) == {"train", "resume", "drill", "evaluation", "reshard", "upkeep"}
    schedules = {
        name: [(s["schedule"]["cron"], s["active"]) for s in each["schedules"]]
        for name, each in found.items()
    }
    assert schedules["upkeep"] == [("7 * * * *", True)]
    assert schedules["train"] == [("0 3 * * *", False)]
    assert found["train"]["schedules"][0]["parameters"] == {"spec": {}}
    assert found["train"]["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert found["train"]["global_concurrency_limit"]["limit"] == 1


def test_the_forms_fields_come_from_the_specification_with_bounds_and_descriptions(served):
    schema = served.deployments()["train"]["parameter_openapi_schema"]
    steps = schema["definitions"]["TrainingSpec"]["properties"]["steps"]
    assert (steps["default"], steps["minimum"]) == (RunSpec().training.steps, 1)
    assert steps["description"]
    assert schema["definitions"]["CheckpointSpec"]["properties"]["codec"]["enum"] == ["raw", "zstd", "planes"]


def test_a_scheduled_run_fires(served):
    deployment = served.deployments()["upkeep"]["id"]
    every_second = {"active": True, "schedule": {"interval": 15, "anchor_date": "2026-01-01T00:00:00Z"}}
    made = served.call("POST", f"/deployments/{deployment}/schedules", [every_second])
    try:
        eventually(
            lambda: [
                run
                for run in served.flow_runs("upkeep")
                if run["auto_scheduled"] and run["state_type"] == "COMPLETED"
            ],
            120,
            "a scheduled run of upkeep",
        )
    finally:
        served.call("DELETE", f"/deployments/{deployment}/schedules/{made[0]['id']}")


def test_a_checkpoint_is_resharded_from_the_form(served):
    source, target = (str(served.directory / name) for name in ("layouts", "resharded"))
    save_state(checkpoint.open_store(source), adam_state(block_weights()))
    order = {"source": source, "target": target, "to": "shard=2,tensor=2"}
    flow_run = served.trigger("reshard", {"order": order})
    assert served.await_end(flow_run, 100)["state_type"] == "COMPLETED", served.logs(flow_run)
    assert bits_of(checkpoint.open_store(target)) == bits_of(checkpoint.open_store(source))
    told = served.artifacts(flow_run)["table"]
    assert {row["proof"] for row in json.loads(told["data"])} == {"fingerprint"}
    schema = served.deployments()["reshard"]["parameter_openapi_schema"]["definitions"]["ConversionOrder"]
    assert all(each["description"] for each in schema["properties"].values())


def test_a_run_from_the_form_trains_and_shows_its_logs_and_its_report(served):
    flow_run = served.trigger("train", {"spec": tiny_spec(served.directory), "name": "formed"})
    ended = served.await_end(flow_run, 150)
    assert (ended["state_type"], ended["name"]) == ("COMPLETED", "formed"), served.logs(flow_run)
    assert {path.name for path in (served.directory / "runs" / "formed").iterdir()} >= {
        *("spec.json", "report.json", "timeline.png", "published", "store"),
    }
    eventually(
        lambda: {"progress", "markdown", "image"} <= set(served.artifacts(flow_run)), 20, "all artifacts"
    )
    summary = served.artifacts(flow_run)["markdown"]["data"]
    assert "# Run formed: finished" in summary
    assert "data:image/png;base64," in summary
    names = eventually(
        lambda: (
            {record["name"] for record in served.logs(flow_run)}
            & {"prefect.task_runs.w0", "prefect.task_runs.w1"}
        ),
        20,
        "log lines of workers, under their own names",
    )
    assert names


def test_a_drill_reports_its_recovery_and_each_checkpoint_can_be_scored(served):
    spec = tiny_spec(served.directory, training={"steps": 60})
    flow_run = served.trigger("drill", {"spec": spec, "name": "drilled"})
    assert served.await_end(flow_run, 120)["state_type"] == "COMPLETED", served.logs(flow_run)
    rows = json.loads(
        eventually(lambda: served.artifacts(flow_run).get("table"), 20, "the drill's table")["data"]
    )
    assert len(rows) == 1
    assert rows[0]["redone"] == "0"

    flow_run = served.trigger("evaluation", {"name": "drilled"})
    assert served.await_end(flow_run, 60)["state_type"] == "COMPLETED", served.logs(flow_run)
    directory = served.directory / "runs" / "drilled"
    assert len(list((directory / "evaluations").iterdir())) == len(
        list((directory / "store" / "manifests").iterdir())
    )


def test_a_value_out_of_bounds_is_refused_when_the_form_is_sent(served):
    spec = tiny_spec(served.directory, training={"steps": 0})
    with pytest.raises(Exception, match="409"):
        served.trigger("train", {"spec": spec})


def test_a_run_whose_process_is_killed_is_resumed_by_itself(served):
    spec = tiny_spec(served.directory, training={"steps": 400})
    first = served.trigger("train", {"spec": spec, "name": "killed"})
    directory = served.directory / "runs" / "killed"
    eventually(lambda: '"StepCommitted"' in _read(directory / "journal.jsonl"), 100, "a committed step")
    os.kill(_holder(directory / "driver.lock"), signal.SIGKILL)
    assert served.await_end(first, 60)["state_type"] == "CRASHED"
    again = eventually(
        lambda: [run for run in served.flow_runs("resume") if run["name"] == "killed"], 60, "a resume"
    )
    for run in again:  # two, if Prefect delivered the crash twice: then one of them does nothing
        assert served.await_end(run["id"], 120)["state_type"] == "COMPLETED"
    assert again[0]["created_by"]["type"] == "AUTOMATION"
    assert len(_read(directory / "restarts.log").splitlines()) == 1


def _holder(path: Path) -> int:
    """Return the process that has this file open."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(path) in {file.path for file in process.open_files()}:
                return process.pid
    raise AssertionError(f"no process has {path} open")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
