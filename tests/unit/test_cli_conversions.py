"""The command line of conversions: what it tells, exit codes, JSON, interruption, and what it imports."""

import json
import math
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import checkpoint
from flows import console, conversions
from flows.cli import app
from flows.tables import Leaf, draw_tree, parse_bytes
from tests.conversion_samples import adam_state, bits_of, block_weights, save_state
from tests.interop.unpacking import unpack
from tests.resharding_matrix import MODELS, make_truth

REPOSITORY = Path(__file__).resolve().parents[2]
VERBS = ("reshard", "import", "export", "copy", "diff", "plan")


def ask(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments), terminal_width=120)


def told(*arguments):
    """Run a command with --json, which has to succeed; return what it tells."""
    done = ask(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("made") / "store")
    for step in (3, 4):
        save_state(checkpoint.open_store(url), adam_state(block_weights()), step=step)
    return url


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_speaks_json(verb):
    shown = ask(verb, "--help")
    assert shown.exit_code == 0
    assert "--json" in shown.output


def test_a_checkpoint_is_resharded_and_says_how_it_was_proved(source, tmp_path):
    target = str(tmp_path / "target")
    arguments = ["reshard", source, target, "--to", "replica=2,shard=4,tensor=2", "--step", "3"]
    planned = told(*arguments, "--dry-run")
    assert planned["is_dry"]
    assert not Path(target).exists()
    report = told(*arguments, "--memory-budget", "128MiB")
    assert report["proved"] == {"fingerprint": report["num_tensors"], "reference": 0}
    assert report["peak_bytes"] <= 128 << 20
    assert bits_of(checkpoint.open_store(target)) == bits_of(checkpoint.open_store(source), 3)
    assert told("inspect", target)["layout"] == "replica=2,shard=4,tensor=2"
    assert "the source's content fingerprint" in ask("reshard", source, str(tmp_path / "b")).output
    assert "already" in ask(*arguments).output


def test_a_copy_is_the_same_objects_and_says_what_was_there(source, tmp_path):
    target = str(tmp_path / "target")
    assert [each["step"] for each in told("copy", source, target)] == [4]
    assert [each["is_new"] for each in told("copy", source, target, "--all")] == [True, False]
    assert "was there" in ask("copy", source, target, "--step", "3").output
    done = ask("copy", source, target, "--step", "9")
    assert done.exit_code == 2
    assert "no checkpoint of step 9; it has: 3, 4" in done.output


def test_a_rank_is_told_what_it_would_read(source):
    whole, half = (told("plan", source, "--to", to) for to in ("replica=2", "shard=2"))
    assert half["num_bytes"] < 0.6 * whole["num_bytes"]
    assert whole["num_tensors"] == half["num_tensors"]
    assert len(half["packs"]) == 1
    assert "rank 0 of shard=2" in ask("plan", source, "--to", "shard=2").output


# ------------------------------------------------------------------------------------------------ diff


def test_equal_checkpoints_of_other_layouts_differ_in_nothing_and_are_not_read(source, tmp_path):
    target = str(tmp_path / "target")
    told("reshard", source, target, "--to", "shard=3")
    assert {each["verdict"] for each in told("diff", source, target)} == {"equal"}
    for pack in (tmp_path / "target" / "packs").iterdir():
        pack.unlink()
    assert ask("diff", source, target).exit_code == 0, "fingerprints tell"


def test_what_differs_is_named_with_how_far_apart_it_is(tmp_path):
    weights = block_weights(layers=1)
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    save_state(checkpoint.open_store(one), {"model": weights})
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed["wte.weight"][3, 4] += 0.5
    changed["h.0.norm.bias"][1] = math.nan
    changed["h.0.attn.o_proj.weight"] = changed["h.0.attn.o_proj.weight"].to(torch.bfloat16)
    changed["new"] = changed.pop("h.0.attn.qkv.weight")
    save_state(checkpoint.open_store(other), {"model": changed})
    done = ask("diff", one, other, "--json")
    assert done.exit_code == 1
    found = {each["name"].removeprefix("model/"): each for each in json.loads(done.stdout)}
    assert {name: each["verdict"] for name, each in found.items()} == {
        "wte.weight": "different",
        "h.0.attn.qkv.weight": "missing",
        "h.0.attn.o_proj.weight": "dtype",
        "h.0.norm.bias": "different",
        "new": "extra",
    }
    assert found["wte.weight"]["max_abs"] == pytest.approx(0.5)
    assert found["wte.weight"]["num_different"] == found["h.0.norm.bias"]["num_different"] == 1
    assert found["h.0.norm.bias"]["max_abs"] == "inf"
    assert 0 < found["h.0.attn.o_proj.weight"]["max_abs"] < 0.02
    shown = ask("diff", one, other)
    assert shown.exit_code == 1
    assert "0 of 5 tensors have equal bits" in shown.output


def test_steps_of_one_store_are_compared(source):
    assert ask("diff", source, source, "--step", "3", "--other-step", "4").exit_code == 0


# ------------------------------------------------------------------------------ foreign, both ways


def test_a_model_goes_out_to_hugging_face_and_comes_back(source, tmp_path):
    model, back = str(tmp_path / "model"), str(tmp_path / "back")
    assert told("export", source, model, "--format", "hf", "--dry-run")["num_tensors"] == 7
    report = told("export", source, model, "--format", "hf")
    assert report["proved"]["fingerprint"] == 7
    assert "left out" in report["notes"][0]
    assert told("inspect", model)["format"] == "hf"
    assert "wte.weight" in ask("inspect", model).output
    assert told("import", model, back, "--dry-run")["is_dry"]
    assert told("import", model, back, "--run", "mine", "--step", "8")["step"] == 8
    compared = json.loads(ask("diff", source, back, "--json").stdout)
    verdicts = {each["name"].startswith("model/"): each["verdict"] for each in compared}
    assert verdicts == {True: "equal", False: "missing"}
    direct = json.loads(ask("diff", back, model, "--json").stdout)
    assert {each["verdict"] for each in direct} == {"equal"}
    done = ask("export", source, model, "--format", "hf")
    assert done.exit_code == 1
    assert "nothing is overwritten" in done.output


def test_a_foreign_checkpoint_goes_straight_into_another_format(tmp_path):
    weights = {f"layers.{number}.weight": torch.randn(2048, 1024) for number in range(3)}
    torch.save(weights, tmp_path / "a.pt")
    model, half = str(tmp_path / "model"), str(tmp_path / "half")
    report = told("export", str(tmp_path / "a.pt"), model, "--format", "hf", "--source-format", "torch")
    assert report["proved"] == {"fingerprint": 3, "reference": 0}
    assert {each["verdict"] for each in told("diff", str(tmp_path / "a.pt"), model)} == {"equal"}
    report = told("export", str(tmp_path / "a.pt"), half, "--format", "hf", "--dtype", "bf16")
    assert report["proved"] == {"fingerprint": 0, "reference": 3}
    found = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(found[name], one.bfloat16()) for name, one in weights.items())


def test_a_llama_goes_by_rules_to_megatrons_ranks_and_from_there_to_hugging_face(tmp_path):
    truth = make_truth("Llama")
    name, given = MODELS["Llama"]
    sizes = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    store, ranks, back, model = (str(tmp_path / one) for one in ("store", "ranks", "back", "model"))
    checkpoint.promote(truth.store, checkpoint.open_store(store), 9)
    spread = ["--rules", name, *sizes, "--to", "tensor=2,pipeline=2", "--only", "model/*"]
    assert told("export", store, ranks, "--format", "megatron", *spread)["num_tensors"] == 21
    assert told("inspect", ranks)["layout"] == "tensor=2, pipeline=2"
    assert told("import", ranks, back, "--rules", name, *sizes)["proved"]["fingerprint"] == 21
    assert ask("import", ranks, str(tmp_path / "no")).exit_code == 1, "without rules nobody can tell"
    found = bits_of(checkpoint.open_store(back))
    assert found == {key: bits for key, bits in bits_of(truth.store).items() if key.startswith("model/")}
    read = [word if word != "--set" else "--source-set" for word in sizes]
    rules = ["--source-rules", name, *read, "--rules", "llama-hf"]
    told("export", ranks, model, "--format", "hf", *rules)
    loaded = load_file(tmp_path / "model" / "model.safetensors")
    expected = checkpoint.load(truth.store).state["model"]["layers.1.attention.k.weight"]
    assert torch.equal(loaded["model.layers.1.self_attn.k_proj.weight"], expected)


@pytest.mark.parametrize("format", ["dcp", "torch", "deepspeed-universal"])
def test_a_training_goes_out_to_a_format_and_comes_back(format, source, tmp_path):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    told("export", source, out, "--format", format)
    told("import", out, back)
    compared = json.loads(ask("diff", source, back, "--json").stdout)
    assert {each["verdict"] for each in compared if not each["name"].endswith("/master")} == {"equal"}


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_goes_to_another_stage_and_number_of_ranks(stage, tmp_path):
    source, _ = unpack("zero2-bf16-3", tmp_path)
    target = str(tmp_path / "out")
    spread = ["--format", "deepspeed", "--to", f"replica=4,zero={stage}"]
    assert told("export", str(source), target, *spread)["proved"]["reference"] == 0
    assert told("inspect", target)["notes"] == [f"saved by 4 ranks with ZeRO stage {stage}"]
    assert {each["verdict"] for each in told("diff", str(source), target)} == {"equal"}


def test_a_file_of_torch_save_is_imported_and_restored(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 5}, tmp_path / "a.pt"
    )
    url = str(tmp_path / "store")
    assert told("import", str(tmp_path / "a.pt"), url)["step"] == 5
    other = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    fresh = torch.optim.AdamW(other.parameters())
    with checkpoint.Checkpointer(url) as checkpointer:
        checkpointer.restore({"model": other, "optimizer": fresh})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for one, two in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(one[kind], two[kind]) for kind in one)
    assert fresh.param_groups[0]["lr"] == 0.25


def test_an_order_of_parameters_that_no_file_tells_is_believed_if_it_is_said(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    source, store = str(tmp_path / "a.pt"), str(tmp_path / "store")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    refused = ask("import", source, store)
    assert refused.exit_code == 1 and "--by-order" in refused.output
    assert ask("export", source, str(tmp_path / "out"), "--format", "dcp").exit_code == 1
    assert any("0.weight, 1.weight" in note for note in told("import", source, store, "--by-order")["notes"])
    told("export", source, str(tmp_path / "out"), "--format", "dcp", "--by-order")


def test_the_home_directory_is_found_by_every_verb(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    told("copy", source, str(tmp_path / "mine"))
    told("inspect", "~/mine")
    told("diff", "~/mine", source)
    told("copy", "~/mine", "~/copied")
    told("export", "~/mine", "~/exported", "--format", "dcp")
    told("import", "~/exported", "~/imported")
    told("reshard", "~/mine", "~/again")
    there = {path.name for path in tmp_path.iterdir()}
    assert {"copied", "exported", "imported", "again"} <= there


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "shard"], ["write it like replica=2,shard=4,tensor=2"]),
        (["--dtype", "int8"], ["bfloat16"]),
        (["--memory-budget", "much"], ["'much' is no size"]),
        (["--memory-budget", "1MiB"], ["at least 128 MiB"]),
        (["--rules", "nonsense"], ["llama-megatron"]),
        (["--set", "layers=2"], ["--rules"]),
        (["--rules", "llama-hf", "--set", "layers"], ["layers=12"]),
        (["--step", "x"], ["Invalid value"]),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(source, tmp_path, arguments, words):
    done = ask("reshard", source, str(tmp_path / "target"), *arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert all(word in done.output for word in words), done.output


def test_what_fails_exits_with_1_and_debug_shows_where(tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("reshard", str(tmp_path / "empty"), str(tmp_path / "target"))
    done = ask(*words)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert isinstance(ask("--debug", *words).exception, checkpoint.NoCheckpoint)


def test_an_interruption_says_that_it_can_go_on(source, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "reshard", interrupted)
    done = ask("reshard", source, str(tmp_path / "target"))
    assert done.exit_code == 130
    assert "the same command goes on from there" in done.output


@pytest.mark.slow
def test_ctrl_c_in_the_middle_keeps_what_is_finished(tmp_path):
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    weights = {f"layers.{number}.weight": torch.randn(1 << 20) for number in range(12)}
    save_state(checkpoint.open_store(source), {"model": weights})
    script = (
        "import os, signal\nfrom contextlib import contextmanager\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it\n"
        "from flows import cli, cli_conversions\n"
        "def listener(step):\n"
        "    if step.num_done_bytes > 0.7 * step.num_bytes: os.kill(os.getpid(), signal.SIGINT)\n"
        "@contextmanager\n"
        "def followed(): yield listener\n"
        "cli_conversions.followed = followed\n"
        "cli.main()\n"
    )
    arguments = ["reshard", source, target, "--to", "shard=2", "--memory-budget", "128MiB"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "the same command goes on from there" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert 0 < told(*arguments)["num_resumed_bytes"] < 48 << 20
    assert bits_of(checkpoint.open_store(target)) == bits_of(checkpoint.open_store(source))


# ------------------------------------------------------------------------------------- on the terminal


def test_progress_is_shown_to_who_watches_and_to_nobody_else(monkeypatch):
    for is_terminal in (True, False):
        seen = Console(force_terminal=is_terminal, width=100, record=True, file=StringIO())
        monkeypatch.setattr(console, "complaints", seen)
        with console.followed() as listener:
            listener(checkpoint.Progress("converting", 1 << 20, 4 << 20))
        shown = seen.export_text()
        assert ("1.0/4.2 MB" in shown or "1.0/4.0 MiB" in shown) is is_terminal, shown


def test_a_tree_joins_paths_that_do_not_fork():
    seen = Console(record=True, width=100, file=StringIO())
    leaves = [
        Leaf(("a", "b", "c"), "one", 1024),
        Leaf(("a", "b", "d"), "two", 1024),
        Leaf(("e",), "three", 1),
    ]
    draw_tree(seen, "all", leaves)
    shown = seen.export_text()
    assert "a/b  2.0 KiB" in shown
    assert "c  one" in shown
    assert "e  three" in shown


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("512M", 512 << 20), ("77", 77), ("2 kib", 2048)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


def test_a_shell_completes_verbs_and_values():
    completed = {"_HOLDFAST_COMPLETE": "complete_bash", "_TYPER_COMPLETE_TESTING": "1"}
    for words, wanted in [("holdfast resh", "reshard"), ("holdfast import a b --rules llama", "llama-hf")]:
        asked = {**completed, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = CliRunner().invoke(app, [], env=asked, prog_name="holdfast")
        assert wanted in done.output, done.output


def test_differences_without_a_number_are_spelled():
    spec = checkpoint.TensorSpec("a", "float32", ())
    one = checkpoint.Compared("a", checkpoint.Verdict.DIFFERENT, spec, spec, math.inf, 1)
    assert conversions.describe_difference(one)["max_abs"] == "inf"


@pytest.mark.parametrize(
    ("verb", "shunned"),
    [
        (["inspect"], {"prefect", "ray", "elastic", "torch"}),
        (["plan", "--to", "shard=2"], {"prefect", "ray", "elastic", "torch"}),
        (["reshard", "--dry-run", "nowhere"], {"prefect", "ray", "elastic"}),
    ],
)
def test_verbs_import_only_what_they_need(verb, shunned, source):
    script = (
        "import sys\nfrom flows.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    code = end.code\n"
        f"loaded = {shunned!r} & set(sys.modules)\n"
        "sys.exit(f'{loaded} {code}' if loaded or code else 0)"
    )
    name, *rest = verb
    done = subprocess.run(
        [sys.executable, "-c", script, name, source, *rest],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
