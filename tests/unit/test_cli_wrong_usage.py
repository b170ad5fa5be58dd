"""What no checkpoint could be asked, and what is no checkpoint: which exit code, and one clear error."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

import checkpoint
from flows.cli import app, main
from flows.cli_checkpoints import FORMATS
from flows.console import mode
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


_NO_STEP = "SOURCE has no checkpoint of step 99; it has: 3"
_NO_NAME = "'zz*' fits nothing of step 3 of SOURCE: `holdfast inspect` lists its names"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect SOURCE --step 99", _NO_STEP),
        ("verify SOURCE --step 99", _NO_STEP),
        ("copy SOURCE TARGET --step 99", _NO_STEP),
        ("copy SOURCE TARGET --step 3 --step 99", _NO_STEP),
        ("plan SOURCE --to shard=2 --step 99", _NO_STEP),
        ("diff SOURCE SOURCE --step 99", _NO_STEP),
        ("diff SOURCE SOURCE --other-step 99", _NO_STEP),
        ("reshard SOURCE TARGET --step 99", _NO_STEP),
        ("export SOURCE TARGET --format hf --step 99", _NO_STEP),
        ("inspect FOREIGN --step 4", "FOREIGN is no store of checkpoints, so it has no step 4"),
        ("export FOREIGN TARGET --format hf --step 4", "FOREIGN is no store"),
        ("diff FOREIGN SOURCE --step 4", "FOREIGN is no store"),
        ("reshard SOURCE TARGET --only zz*", _NO_NAME),
        ("reshard SOURCE TARGET --only zz* --dry-run", _NO_NAME),
        ("export SOURCE TARGET --format hf --only zz*", _NO_NAME),
        ("export FOREIGN TARGET --format hf --only zz*", "'zz*' fits nothing of step 0 of FOREIGN"),
        (
            "export SOURCE TARGET --format hf --only optimizer/*",
            "hf has a place for nothing that 'optimizer/*' fits",
        ),
        ("import FOREIGN TARGET --tie a=b", "'a' cannot be tied to 'b': there is no weight 'b'"),
        ("plan SOURCE --to pipeline=99", "the 2 layers cannot be dealt to 99 stages"),
        ("reshard SOURCE TARGET --to pipeline=99", "the 2 layers cannot be dealt to 99 stages"),
    ],
)
def test_what_names_something_that_is_not_there_has_to_be_called_otherwise_and_exits_with_2(
    source, tmp_path, command, words
):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    places = {"SOURCE": source, "TARGET": str(tmp_path / "target"), "FOREIGN": str(tmp_path / "a.pt")}
    done = ask(*(places.get(word, word) for word in command.split()), "--json")
    assert done.exit_code == 2, done.output
    told = json.loads(done.stdout)
    assert told["exit_code"] == 2
    for word, place in places.items():
        words = words.replace(word, place)
    assert words in told["error"].replace("file://", "")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "command",
    [
        "inspect MISSING",
        "verify MISSING",
        "verify EMPTY",
        "prune MISSING --keep latest:1",
        "prune EMPTY --keep latest:1",
        "copy MISSING TARGET",
        "copy EMPTY TARGET",
        "diff SOURCE MISSING",
        "plan EMPTY --to shard=2",
        "reshard EMPTY TARGET",
        "reshard SPOILT TARGET",
        "plan SPOILT --to shard=2",
        "verify SPOILT",
        "inspect SPOILT",
        "import MISSING TARGET",
        "export MISSING TARGET --format hf",
        "export SOURCE SOURCE --format hf",
        "import FOREIGN TAKEN",
    ],
)
def test_a_place_that_has_not_what_it_should_is_no_wrong_usage_and_exits_with_1(source, tmp_path, command):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    places = {"SOURCE": source, "FOREIGN": str(tmp_path / "a.pt")}
    for place in ("TARGET", "EMPTY", "SPOILT", "TAKEN"):
        places[place] = str(tmp_path / place)
    for place in ("EMPTY", "SPOILT", "TAKEN"):
        checkpoint.claim_generation(checkpoint.open_store(places[place]), 1, "token")
    checkpoint.open_store(places["SPOILT"]).put("manifests/000000000003", b"spoilt")
    save_state(checkpoint.open_store(places["TAKEN"]), {"model": {"v": torch.ones(3)}}, step=0)
    done = ask(*(places.get(word, word) for word in command.split()))
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output


def test_a_store_whose_only_manifest_is_damaged_is_not_said_to_hold_none(tmp_path):
    checkpoint.open_store(str(tmp_path / "spoilt")).put("manifests/000000000003", b"spoilt")
    done = ask("reshard", str(tmp_path / "spoilt"), str(tmp_path / "target"))
    assert "holds no checkpoint" not in done.output
    assert "manifests/000000000003" in done.output


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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("diff --no-such-option", ["diff: ", "--no-such-option", "holdfast diff --help"]),
        ("plan made", ["plan: ", "--to", "holdfast plan --help"]),
        (
            "plan made --to shard=2 --rank -1",
            ["plan: ", "--rank", "than or equal to 0. ", "holdfast plan --help"],
        ),
        ("export made x --format pickle", ["pickle", "deepspeed-universal", "holdfast export --help"]),
        ("expotr made x", ["expotr", "export", "holdfast --help"]),
        ("reshard made", ["reshard: ", "DST", "holdfast reshard --help"]),
    ],
)
def test_wrong_usage_says_in_json_all_that_it_says_to_people(monkeypatch, capsys, command, words):
    monkeypatch.setattr("sys.argv", ["holdfast", *command.split(), "--json"])
    monkeypatch.setattr(mode, "is_told", False)  # as in a process of its own
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (told["kind"], told["exit_code"], end.value.code) == ("UsageError", 2, 2)
    assert all(word in told["error"] for word in words), told
    assert "Usage: holdfast" in shown.err


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


@pytest.mark.parametrize(
    "words", [["verify"], ["plan", "--to", "shard=2"], ["prune", "--keep", "latest:1"], ["copy", "TARGET"]]
)
def test_a_file_where_a_store_should_be_is_told_to_be_one(tmp_path, words):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    verb, *rest = [str(tmp_path / "to") if word == "TARGET" else word for word in words]
    done = ask(verb, str(tmp_path / "a.pt"), *rest)
    assert done.exit_code == 1
    assert "a.pt is a file, and a store is a directory" in done.output


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path):
    torch.save({"w\x1b[2J": torch.ones(2), "\x9b31mred": torch.ones(3)}, tmp_path / "a.pt")
    torch.save({"w\x1b[2J": torch.ones(4)}, tmp_path / "b.pt")
    for words in (["inspect", "a.pt"], ["diff", "a.pt", "b.pt"], ["inspect", "no\x1b[2J.pt"]):
        verb, *files = words
        done = ask(verb, *(str(tmp_path / name) for name in files))
        assert "\\x1b[2J" in done.output
        assert not {"\x1b", "\x9b"} & set(done.output)


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
    assert done.exit_code == 2
    assert "is no store of checkpoints, so it has no step 3" in done.output
