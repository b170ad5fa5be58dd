"""The command line: help worth reading, one clear error per mistake, the core verbs on a real store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import checkpoint
from flows.cli import app

VERBS = ("train", "drill", "resume", "serve", "keys", "inspect", "verify", "prune", "doctor")
REPOSITORY = Path(__file__).resolve().parents[2]


def ask(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments), terminal_width=120)


@pytest.fixture
def store(tmp_path):
    """Make a store with checkpoints of three steps."""
    url = str(tmp_path / "store")
    host = checkpoint.LocalHost(checkpoint.open_store(url), arena_bytes=1 << 20)
    saver = checkpoint.Saver(host, "made", checkpoint.SavePolicy())
    for step in (1, 2, 3):
        state = {"model": {"weight": torch.full((4, 3), float(step))}, "cursor": {"step": step}}
        saver.save(step, state, checkpoint.Share(1, 0, 1, ("local",)), {})
        saver.wait_captured()
        assert saver.drain(30)
    saver.close()
    host.close()
    return url


def test_the_help_names_every_verb_and_says_where_to_begin():
    shown = ask("--help").output
    assert all(verb in shown for verb in VERBS)
    assert "examples/first_run.toml" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_every_option_explains_itself(verb):
    done = ask(verb, "--help")
    assert done.exit_code == 0
    assert len(done.output.splitlines()) > 5


def test_the_keys_are_listed_with_bounds_and_meaning():
    shown = ask("keys").output
    assert "training.steps" in shown
    assert "Optimizer steps." in shown
    assert "raw or zstd" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--set", "training.stesp=3"], ["training.stesp", "training.steps"]),
        (["train", "--steps", "3", "--set", "training.steps=4"], ["training.steps is set twice"]),
        (["train", "missing.toml"], ["missing.toml"]),
        (["train", "--name", "../escape"], ["'../escape' cannot name a run"]),
        (["drill", "--set", "world.workers=0"], ["world.workers = 0"]),
        (["resume", "nobody", "--runs-dir", "nowhere"], ["no run nobody", "nowhere"]),
        (["inspect", "nothing-here"], ["nothing-here", "neither a URL"]),
        (["verify", "memory://empty"], ["memory://empty", "no checkpoint"]),
        (["prune", "memory://empty", "--keep", "latest:1"], ["nothing was deleted"]),
    ],
)
def test_a_mistake_gives_one_clear_error_and_no_traceback(arguments, words):
    done = ask(*arguments)
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output
    assert done.output.startswith("error: ")
    assert all(word in done.output for word in words), done.output


def test_an_existing_run_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "taken").mkdir()
    done = ask("train", "--name", "taken", "--set", f"pipeline.runs_dir={tmp_path}")
    assert done.exit_code == 1
    assert "holdfast resume taken" in done.output


def test_inspect_lists_checkpoints_and_their_contents(store):
    shown = ask("inspect", store).output
    assert "model/weight" in shown
    assert "4x3" in shown
    found = json.loads(ask("inspect", store, "--json").output)
    assert [each["step"] for each in found["checkpoints"]] == [1, 2, 3]
    assert found["shown"] == 3


def test_a_run_is_inspected_by_its_name(store, tmp_path):
    directory = tmp_path / "runs" / "mine"
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text(json.dumps({"checkpoint": {"store": store}}))
    found = json.loads(ask("inspect", "mine", "--runs-dir", str(tmp_path / "runs"), "--json").output)
    assert len(found["checkpoints"]) == 3


def test_a_step_that_is_not_there_is_refused_with_those_that_are(store):
    done = ask("inspect", store, "--step", "9")
    assert done.exit_code == 2
    assert "1, 2, 3" in done.output


def test_verify_reads_everything_back_and_names_what_is_damaged(store):
    assert ask("verify", store).exit_code == 0
    pack = next(Path(store).glob("packs/*"))
    data = bytearray(pack.read_bytes())
    data[10] ^= 1
    pack.write_bytes(data)
    done = ask("verify", store, "--json")
    assert done.exit_code == 1
    assert "model/weight" in "".join(item for each in json.loads(done.output) for item in each["bad"])


def test_an_edited_manifest_is_shown_as_damaged(store):
    manifest = Path(store) / "manifests" / f"{3:012d}"
    manifest.write_bytes(manifest.read_bytes().replace(b"made", b"edit", 1))
    done = ask("inspect", store)
    assert done.exit_code == 1
    assert "DAMAGED" in done.output
    assert f"manifests/{3:012d}" in done.output


def test_prune_says_whose_the_checkpoints_are_if_they_are_of_several_runs(store):
    assert "several runs" not in ask("prune", store, "--keep", "latest:9").output
    with checkpoint.Checkpointer(
        store, run="other", options=checkpoint.Options(arena_mib=2, lease_s=0.2)
    ) as own:
        state = {"model": {"weight": torch.zeros(4, 3)}, "cursor": {"step": 0}}
        assert own.restore(state, run="made") is not None
        own.save(4, state)
    done = ask("prune", store, "--keep", "latest:9")
    assert "of several runs: 'made' has steps 1, 2, 3; 'other' has steps 4" in " ".join(done.output.split())


def test_a_damaged_receipt_is_shown_and_is_no_failure(store):
    receipt = next(Path(store).glob("index/*-0000"))
    receipt.write_bytes(receipt.read_bytes()[:-1])
    done = ask("verify", store, "--json")
    assert done.exit_code == 0
    assert [bool(each["spare"]) for each in json.loads(done.output)].count(True) == 1


def test_prune_keeps_what_its_policies_keep(store):
    pruned = json.loads(ask("prune", store, "--keep", "latest:1", "--keep", "every:2", "--json").output)
    assert (pruned["kept"], pruned["deleted"]) == ([2, 3], [1])
    assert ask("verify", store).exit_code == 0


def test_the_best_by_a_metric_that_no_checkpoint_has_is_wrong_usage(store):
    done = ask("prune", store, "--keep", "best:los:min:1")
    assert done.exit_code == 2 and "'los'" in done.output and "nothing was deleted" in done.output
    assert len(json.loads(ask("inspect", store, "--json").output)["checkpoints"]) == 3
    checkpoint.record_score(checkpoint.open_store(store), 2, {"los": 0.5})
    assert ask("prune", store, "--keep", "best:los:min:1").exit_code == 0
    assert checkpoint.Catalog(checkpoint.open_store(store)).steps() == [2, 3]


@pytest.mark.parametrize("policy", ["pinned:", "pinned:,", "pinned:1,99"])
def test_pinned_steps_that_are_none_or_not_there_are_wrong_usage(store, policy):
    done = ask("prune", store, "--keep", policy)
    assert done.exit_code == 2
    assert len(json.loads(ask("inspect", store, "--json").output)["checkpoints"]) == 3


def test_doctor_looks_at_versions_and_a_store(tmp_path):
    done = ask("doctor", "--store", str(tmp_path / "new"), "--json")
    found = {each["what"]: each for each in json.loads(done.output)}
    assert found["torch"]["found"] == torch.__version__
    assert found["store"]["trouble"] == ""
    assert checkpoint.fingerprinted_by() in found["fingerprints"]["found"]


def test_doctor_tells_of_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = ask("doctor", "--store", str(tmp_path / "file" / "store"), "--json")
    assert done.exit_code == 1
    assert [each["what"] for each in json.loads(done.output) if each["trouble"]] == ["store"]


@pytest.mark.parametrize(
    "verb", [["inspect"], ["verify"], ["prune", "--keep", "latest:1"], ["doctor", "--store"]]
)
def test_the_core_verbs_import_neither_prefect_nor_ray(verb, store):
    script = (
        "import sys\nfrom flows.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    code = end.code\n"
        "loaded = {'prefect', 'ray', 'elastic'} & set(sys.modules)\n"
        "sys.exit(f'{loaded} {code}' if loaded or code else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *verb, store],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
