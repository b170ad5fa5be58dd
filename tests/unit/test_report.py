"""The report: its exact keys against the schema and a golden file, its words, and its picture."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import elastic
from tasks.findings import Findings, Scored, as_json, gather, read_score, write_report, write_score
from tasks.picture import draw_course
from tasks.runs import Run
from tasks.spec import RunSpec
from tasks.summary import FAILURE_HEAD, describe_failures, describe_run, write_markdown

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
SCHEMA = json.loads((REPOSITORY / "docs" / "report.schema.json").read_text())

TRAINING = elastic.TrainReport(
    run="gpt-1",
    status="finished",
    reason="all steps are committed and durable",
    num_steps=4,
    committed_steps=4,
    redone_steps=0,
    dropped_attempts=1,
    segments=1,
    worlds=(
        elastic.WorldSpan(1, 4, 0, 0.5, "all 4 workers are there"),
        elastic.WorldSpan(2, 3, 2, 3.0, "3 of 4 workers go on"),
        elastic.WorldSpan(3, 4, 3, 6.5, "all 4 workers are there"),
    ),
    failures=(
        elastic.FailureSpan(
            cause="process died",
            member="w2",
            step=2,
            at_s=2.9,
            detect_s=0.05,
            decide_s=0.001,
            form_s=0.02,
            restore_s=0.01,
            total_s=1.25,
            full_strength_s=3.9,
            redone_steps=0,
            dropped_attempts=1,
            state_source="peer+self",
        ),
    ),
    ettr=0.75,
    wall_s=8.0,
    computing_s=6.0,
    first_loss=5.5,
    last_loss=2.5,
    losses=((1, 5.5, 1.0), (2, 4.0, 2.5), (3, 3.0, 5.0), (4, 2.5, 7.5)),
    durable_at=((2, 2.8), (4, 7.9)),
    checkpoints=elastic.CheckpointCount(2, {"store": 2}, 0, 0.0, 0.004),
    newest_durable_step=4,
    weights_sha256="ab" * 32,
)
VERSIONS = {
    "python": "3.11.9",
    "holdfast": "0.1.0",
    "torch": "2.13.0",
    "ray": "2.60.0",
    "prefect": "3.8.8",
    "numpy": None,
}
FINDINGS = Findings("gpt-1", "finished", TRAINING.reason, TRAINING, Scored(4, 2.4375, 3.25, 8192), VERSIONS)


@pytest.fixture
def run(tmp_path):
    return Run("gpt-1", tmp_path / "gpt-1", RunSpec())


def test_the_report_has_exactly_the_keys_of_the_golden_file():
    assert json.dumps(as_json(FINDINGS), indent=2) + "\n" == (GOLDEN / "report.json").read_text()


def test_the_summary_reads_as_the_golden_file():
    assert write_markdown(FINDINGS, None) == (GOLDEN / "report.md").read_text()


@pytest.mark.parametrize(
    "findings",
    [
        FINDINGS,
        Findings("x", "failed", "the store is gone", None, None, VERSIONS),
        replace(FINDINGS, scored=None, status="stopped"),
        replace(FINDINGS, training=replace(TRAINING, last_loss=float("nan"), weights_sha256=None, ettr=None)),
        replace(FINDINGS, scored=Scored(4, float("inf"), None, 1)),
    ],
)
def test_whatever_happened_the_report_obeys_its_schema(findings, run):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    write_report(run, findings)
    jsonschema.validate(json.loads(run.report_path.read_text()), SCHEMA)


def test_the_schema_forbids_keys_it_does_not_know():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**as_json(FINDINGS), "extra": 1}, SCHEMA)


def test_a_loss_that_is_no_number_is_reported_not_hidden():
    findings = replace(FINDINGS, training=replace(TRAINING, last_loss=float("nan")))
    assert as_json(findings)["loss"]["last"] == "nan"
    assert "nan at last" in dict(describe_run(findings))["training loss"]


def test_a_run_that_never_began_is_reported_with_its_reason(run):
    findings = gather(run, ValueError("the job is no good"))
    assert (findings.status, findings.reason, findings.training) == ("failed", "the job is no good", None)
    assert draw_course(findings) is None


def test_an_interruption_is_a_stop_not_a_failure(run):
    assert gather(run, KeyboardInterrupt()).status == "stopped"


def test_a_score_is_found_again_at_its_own_step_only(run):
    write_score(run, Scored(4, 2.5, None, 100))
    assert read_score(run, 4) == Scored(4, 2.5, None, 100)
    assert read_score(run, 5) is None


def test_the_validation_loss_stands_beside_the_unigram_entropy():
    assert (
        dict(describe_run(FINDINGS))["validation loss"]
        == "2.4375 nats, 0.81 nats below the byte unigrams' 3.2500"
    )


def test_each_failure_is_a_row_under_the_same_head():
    rows = describe_failures(FINDINGS)
    assert len(rows) == 1
    assert all(len(row) == len(FAILURE_HEAD) for row in rows)


def test_the_picture_is_a_png_that_the_summary_carries():
    picture = draw_course(FINDINGS)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert "(data:image/png;base64," in write_markdown(FINDINGS, picture)


def test_a_picture_is_drawn_of_a_run_with_no_step_and_no_world():
    nothing = replace(TRAINING, losses=(), worlds=(), failures=(), durable_at=(), committed_steps=0)
    assert draw_course(replace(FINDINGS, training=nothing, scored=None))
