"""What no checkpoint could be asked, and what is no checkpoint: which exit code, and one clear error."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

import checkpoint
from flows.cli import app, main
from flows.cli_checkpoints import FORMATS
from tests.conversion_samples import adam_state, block_weights, save_state


def ask(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments), terminal_width=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("made") / "store")
    save_state(checkpoint.open_store(url), adam_state(block_weights()), step=3)
    return url


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reshard", "SOURCE", "TARGET", "--rules", "llama-hf"], ["has to be told the size"]),
        (["reshard", "SOURCE", "TARGET", "--to", "shard=1000000"], ["at most 65536 ranks"]),
        (["reshard", "SOURCE", "TARGET", "--step", "-3"], ["--step"]),
        (["plan", "SOURCE", "--to", "shard=2", "--rank", "2"], ["the ranks 0 to 1, not 2"]),
        (["import", "SOURCE", "TARGET", "--step", "-3"], ["--step"]),
        (["import", "SOURCE", "TARGET", "--format", "pickle"], ["pickle", "deepspeed-universal"]),
        (["import", "SOURCE", "TARGET", "--run", ""], ["'' cannot name a run"]),
        (["import", "SOURCE", "TARGET", "--run", "../x"], ["'../x' cannot name a run"]),
        (["export", "SOURCE", "TARGET", "--format", "pickle"], ["pickle", "deepspeed-universal"]),
        (["export", "SOURCE", "TARGET", "--format", "hf", "--source-format", "x"], ["'x'", "megatron"]),
        (["inspect", "SOURCE", "--format", "pickle"], ["pickle", "deepspeed-universal"]),
        (["diff", "SOURCE", "SOURCE", "--other-format", "pickle"], ["pickle", "deepspeed-universal"]),
        (["copy", "SOURCE", "TARGET", "--step", "3", "--all"], ["--step or --all, not both"]),
    ],
)
def test_what_no_checkpoint_could_be_asked_is_wrong_usage(source, tmp_path, arguments, words):
    places = {"SOURCE": source, "TARGET": str(tmp_path / "target")}
    done = ask(*(places.get(word, word) for word in arguments))
    assert done.exit_code == 2, done.output
    shown = " ".join(done.output.replace("│", " ").split())
    assert all(word in shown for word in words), done.output
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["reshard", "missing", "target", "--json"], "NoSuchRun", 1),
        (["import", "missing", "target", "--json"], "NotFound", 1),
        (["plan", "missing", "--to", "shrd=2", "--json"], "SpecError", 2),
        (["plan", "missing", "--json", "--to", "shard=2", "--rank", "-1"], "UsageError", 2),
        (["diff", "--json", "--no-such-option"], "UsageError", 2),
    ],
)
def test_what_reads_json_reads_the_error_as_json(tmp_path, monkeypatch, capsys, arguments, kind, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["holdfast", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["exit_code"], end.value.code) == (kind, code, code)
    assert told["error"]


@pytest.mark.parametrize("verb", ["inspect", "import", "export", "diff"])
def test_the_help_of_a_verb_lists_every_format(verb):
    shown = " ".join(ask(verb, "--help").output.replace("│", " ").split())
    assert set(checkpoint.format_names()) == set(FORMATS)
    assert "hf, dcp, torch, megatron, megatron-dist, deepspeed, deepspeed-universal" in shown


class Hostile:
    """Runs a command when it is unpickled by somebody careless."""

    def __reduce__(self):
        return os.system, ("true",)


def test_a_file_that_no_format_can_be_is_told_so_as_by_an_import(tmp_path):
    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    (tmp_path / "passwords").write_text("root:x:0:0\n")
    for name in ("hostile.pt", "passwords"):
        shown, imported = (
            ask(*words)
            for words in (
                ["inspect", str(tmp_path / name)],
                ["import", str(tmp_path / name), str(tmp_path / "no")],
            )
        )
        assert shown.exit_code == imported.exit_code == 1
        assert shown.output == imported.output
        assert "manifests/" not in shown.output


def test_a_place_that_is_no_store_is_an_error_and_a_store_without_checkpoints_is_none(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1")
    done = ask("inspect", str(tmp_path / "etc"))
    assert done.exit_code == 1
    assert "looks like none of" in done.output
    checkpoint.claim_generation(checkpoint.open_store(str(tmp_path / "new")), 1, "token")
    done = ask("inspect", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    assert "holds no checkpoint" in " ".join(done.output.split())
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    done = ask("inspect", str(tmp_path / "a.pt"), "--step", "3")
    assert done.exit_code == 1
    assert "is no store of checkpoints, so it has no step 3" in done.output
