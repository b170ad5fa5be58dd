"""The pipeline through the command line, for real: drill, interruption, resume, and runs that cannot be."""

import json
import signal
import subprocess
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from safetensors.torch import load_file

from tests.integration.serving import REPOSITORY, as_settings, command, environment, eventually, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SCHEMA = json.loads((REPOSITORY / "docs" / "report.schema.json").read_text())
FAULT = {"faults": [{"at_step": 20, "kind": "kill_worker", "rank": 1}]}
BROKEN_JOB = """
from elastic.training.gpt import GPTJob


class Broken(GPTJob):
    def loss(self, model, batch, rng):
        raise ArithmeticError("seven is not prime enough")


class Half:
    settings = dict
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def holdfast(home, tmp_path):
    """Return a function that runs the command in the test's directory."""

    def run(*arguments):
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment(home),
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def read_report(directory: Path):
    report = json.loads((directory / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


def test_a_run_survives_its_drill_proves_itself_and_is_published(holdfast, tmp_path):
    spec = tiny_spec(tmp_path, training={"steps": 60}, drill=FAULT)
    done = holdfast("train", "--name", "drilled", *as_settings(spec))
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "runs" / "drilled")
    assert (report["status"], report["steps"]["committed"]) == ("finished", 60)
    assert len(report["failures"]) == 1
    assert report["failures"][0]["redone_steps"] == 0
    assert report["weights_sha256"] in done.stdout
    published = tmp_path / "runs" / "drilled" / "published"
    assert {path.name for path in published.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert load_file(published / "model.safetensors")
    assert json.loads((published / "config.json").read_text())["weights_sha256"] == report["weights_sha256"]

    again = holdfast("resume", "drilled")
    assert again.returncode == 0, again.stderr
    assert read_report(tmp_path / "runs" / "drilled")["weights_sha256"] == report["weights_sha256"]


def num_told(journal: Path) -> int:
    return journal.read_text().count('"StepCommitted"') if journal.exists() else 0


def has_more_steps(journal: Path, known: int) -> bool:
    return num_told(journal) > known


def test_an_interrupted_run_says_how_to_go_on_and_does(holdfast, home, tmp_path):
    spec = as_settings(tiny_spec(tmp_path, training={"steps": 400}))
    directory = tmp_path / "runs" / "stopped"
    journal = directory / "journal.jsonl"
    begins, committed = ["train", "--name", "stopped", *spec], 0
    for words, number, status in ((begins, signal.SIGINT, 130), (["resume", "stopped"], signal.SIGTERM, 143)):
        process = subprocess.Popen(
            command(*words),
            cwd=tmp_path,
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        eventually(partial(has_more_steps, journal, num_told(journal)), 100, "a committed step")
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == status, output
        assert "holdfast resume stopped" in output
        stopped = read_report(directory)
        assert stopped["status"] == "stopped"
        assert committed < stopped["steps"]["committed"] < 400
        committed = stopped["steps"]["committed"]

    resumed = holdfast("resume", "stopped")
    assert resumed.returncode == 0, resumed.stderr
    report = read_report(directory)
    assert (report["status"], report["steps"]["committed"], report["steps"]["segments"]) == (
        "finished",
        400,
        3,
    )
    assert report["steps"]["redone"] == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"job": {"path": "nowhere.at.all:Job"}}, ["nowhere.at.all", "import"]),
        ({"job": {"path": "broken_job:Half"}}, ["Half", "lacks"]),
        ({"job": {"settings": {"wdith": 8}}}, ["wdith", "width"]),
        ({"data": {"source": "no/such/text"}}, ["no/such/text"]),
        ({"checkpoint": {"store": "text/0.txt/store"}}, ["text/0.txt/store"]),
        ({"checkpoint": {"store": "memory://somewhere"}}, ["memory://somewhere"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(holdfast, tmp_path, sections, words):
    (tmp_path / "broken_job.py").write_text(BROKEN_JOB)
    done = holdfast("train", "--name", "refused", *as_settings(tiny_spec(tmp_path, **sections)))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "runs" / "refused").exists()


def test_an_exception_in_the_jobs_own_code_ends_the_run_with_its_words(holdfast, tmp_path):
    (tmp_path / "broken_job.py").write_text(BROKEN_JOB)
    done = holdfast(
        "train", "--name", "broken", *as_settings(tiny_spec(tmp_path, job={"path": "broken_job:Broken"}))
    )
    assert done.returncode == 1
    assert "seven is not prime enough" in done.stderr
    report = read_report(tmp_path / "runs" / "broken")
    assert report["status"] == "failed"
    assert "seven is not prime enough" in report["reason"]
    assert report["weights_sha256"] is None
