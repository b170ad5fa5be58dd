"""Places that are none, lie within another's, or hold something else are refused by every verb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint.errors import Conflict
from checkpoint.format.sealed import seal
from tests.conversion_samples import save_state

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path) -> str:
    save_state(checkpoint.open_store(str(tmp_path / "store")), {"model": {"w": torch.arange(6.0)}})
    return str(tmp_path / "store")


def run(*arguments: str, cwd: Path, to: str | None = None) -> subprocess.CompletedProcess[str]:
    command = f'"$@" > {to}' if to else '"$@"'
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("url", ["s3://", "gs:///", "abfs://", "s3:////"])
@pytest.mark.parametrize("verb", ["copy", "reshard"])
def test_a_url_that_names_no_bucket_is_no_directory(verb, url, store, tmp_path):
    (tmp_path / "cwd").mkdir()
    done = run(verb, store, url, cwd=tmp_path / "cwd")
    assert done.returncode in (1, 2) and "names no place" in done.stderr
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("verb", ["copy", "reshard"])
@pytest.mark.parametrize("folder", ["packs/backup", "index/a/b"])
def test_no_store_is_made_among_another_s_objects(verb, folder, store, tmp_path):
    done = run(verb, store, f"{store}/{folder}", cwd=tmp_path)
    assert done.returncode == 1 and "lies within the store" in done.stderr
    assert not Path(store, folder).exists()


def test_what_cannot_be_written_is_one_error(store, tmp_path):
    done = run("diff", store, store, "--json", cwd=tmp_path, to="/dev/full")
    assert done.returncode == 1
    assert "error:" in done.stderr and "Traceback" not in done.stderr


def test_debugging_still_answers_in_json(tmp_path):
    done = run("--debug", "reshard", "nothere", "x", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["error"]
    assert "Traceback" in done.stderr


def test_what_is_looked_at_says_which_rules_know_it(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert json.loads(run("inspect", ".", "--json", cwd=tmp_path).stdout)["rules"] is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "hidden_size": 32}))
    assert json.loads(run("inspect", ".", "--json", cwd=tmp_path).stdout)["rules"] == "llama-hf"
    assert "rules: llama-hf" in run("inspect", ".", cwd=tmp_path).stdout


def test_a_store_of_which_nothing_was_committed_is_no_unknown_format(tmp_path):
    (tmp_path / "begun" / "packs").mkdir(parents=True)
    (tmp_path / "begun" / "packs" / "one").write_bytes(b"x")
    for verb in (["diff", "begun", "begun"], ["export", "begun", "out", "--format", "hf"]):
        done = run(*verb, cwd=tmp_path)
        assert done.returncode == 1 and "holds no checkpoint: it is a store of ours" in done.stderr


def test_what_a_later_release_wrote_is_not_called_damaged(store, tmp_path):
    path = next(Path(store, "manifests").iterdir())
    path.write_bytes(seal("manifest", path.read_bytes().partition(b"\n")[2], version=7))
    assert "NEWER" in run("inspect", store, cwd=tmp_path).stdout
    done = run("prune", store, "--keep", "latest:1", cwd=tmp_path)
    assert "upgrade holdfast" in done.stdout and "remove" not in done.stdout
    done = run("diff", store, store, cwd=tmp_path)
    assert done.returncode == 1 and str(store) in done.stderr


def test_an_endless_linger_is_wrong_usage(store, tmp_path):
    done = run("prune", store, "--keep", "latest:1", "--linger-s", "inf", cwd=tmp_path)
    assert done.returncode == 2 and "linger" in done.stderr


def test_a_rehearsed_import_tells_the_chunks_that_it_makes(tmp_path):
    torch.save({"model": {"w": torch.randn(9, 4), "b": torch.randn(4)}}, tmp_path / "saved.pt")
    store = checkpoint.open_store(str(tmp_path / "store"))
    adoption = checkpoint.Adoption(to="shard=3")
    told = checkpoint.plan_import_foreign(str(tmp_path / "saved.pt"), store, adoption).num_chunks
    assert told == checkpoint.import_foreign(str(tmp_path / "saved.pt"), store, adoption).num_chunks


@pytest.mark.parametrize(
    "other",
    [{"run": "another"}, {"meta": {"data_cursor": {"pos": 999}}}, {"meta": {"metrics": {"loss": 5.0}}}],
)
def test_equal_tensors_of_another_run_cursor_or_metrics_are_another_checkpoint(other, tmp_path):
    state = {"model": {"w": torch.arange(6.0)}}
    one, there = (checkpoint.open_store(str(tmp_path / name)) for name in ("one", "there"))
    save_state(one, state, meta={"data_cursor": {"pos": 100}, "metrics": {"loss": 1.0}})
    save_state(there, state, **{"meta": {"data_cursor": {"pos": 100}, "metrics": {"loss": 1.0}}, **other})
    with pytest.raises(Conflict, match="another checkpoint of step 3"):
        checkpoint.promote(one, there, 3)
