"""What does not fit: sizes and ranks to a model, options to a store, a store to a directory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import checkpoint
from checkpoint.interop.conversion.contract import ConversionSettings
from flows.cli import app
from tasks.convert import ConversionOrder, carry_out, describe
from tests.conversion_samples import save_state
from tests.resharding_matrix import MODELS, make_truth


def ask(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments), terminal_width=120)


def told(*arguments):
    """Run a command with --json, which has to succeed; return what it tells."""
    done = ask(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Return a Llama in a store, and as Hugging Face files without a configuration."""
    folder = tmp_path_factory.mktemp("misfits")
    found = {"STORE": str(folder / "store"), "HF": str(folder / "hf")}
    checkpoint.promote(make_truth("Llama").store, checkpoint.open_store(found["STORE"]), 9)
    rules = checkpoint.choose_rules(
        "llama-hf", [f"{name}={size}" for name, size in MODELS["Llama"][1].items()]
    )
    emigration = checkpoint.Emigration("hf", rules=rules, only="model/*")
    checkpoint.export_foreign(checkpoint.Whereabouts(found["STORE"]), found["HF"], emigration)
    return found


SIZES = " ".join(f"--set {name}={size}" for name, size in MODELS["Llama"][1].items())


def sizes(**other: int) -> str:
    return " ".join(f"--set {name}={size}" for name, size in (MODELS["Llama"][1] | other).items())


@pytest.mark.parametrize(
    "command",
    [
        f"import HF TARGET --rules llama-hf {sizes(vocab=12)}",
        f"import HF TARGET --rules llama-hf {sizes(layers=1)}",
        f"import HF TARGET --rules llama-hf {sizes(kv_heads=3)}",
        f"export STORE TARGET --format hf --only model/* --rules llama-hf {sizes(vocab=12)}",
        f"export STORE TARGET --format megatron --only model/* --rules llama-megatron --to tensor=3 {SIZES}",
        f"export STORE TARGET --format megatron --rules llama-megatron --to pipeline=3 {SIZES}",
        f"export STORE TARGET --format megatron-dist --rules llama-megatron --to tensor=2 {SIZES}",
        f"export STORE TARGET --format hf --rules llama-megatron --to tensor=2 {SIZES}",
        f"export STORE TARGET --format dcp --rules llama-megatron --to tensor=2 {SIZES}",
        f"reshard STORE TARGET --rules llama-megatron --to tensor=3 {SIZES}",
        "export STORE TARGET --format hf --source-rules llama-hf",
        "export STORE TARGET --format hf --by-order",
        "diff STORE STORE --rules llama-hf",
        "diff STORE STORE --other-rules llama-hf",
        "diff HF STORE --other-rules llama-hf",
        "import HF TARGET --tie a=b --tie b=a",
    ],
)
def test_what_does_not_fit_is_wrong_usage_and_nothing_is_written(places, tmp_path, command):
    known = places | {"TARGET": str(tmp_path / "target")}
    done = ask(*(known.get(word, word) for word in command.split()))
    assert done.exit_code == 2, done.output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_no_wrong_usage_though_sizes_are_given(places, tmp_path):
    weights = load_file(Path(places["HF"]) / "model.safetensors")
    weights.pop(next(iter(weights)))
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    done = ask("import", str(tmp_path / "hf"), str(tmp_path / "out"), "--rules", "llama-hf", *SIZES.split())
    assert done.exit_code == 1, done.output


@pytest.mark.parametrize(
    "field", [{"source_rules": "llama-hf", "source_sizes": ["layers=99"]}, {"by_order": True}]
)
def test_a_form_refuses_what_a_store_has_no_use_for(places, tmp_path, field):
    order = ConversionOrder(
        source=places["STORE"], target=str(tmp_path / "x"), target_format="hf", dry_run=True
    )
    with pytest.raises(checkpoint.Misuse, match="is a store"):
        carry_out(order.model_copy(update=field))


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
def test_a_resharding_that_is_there_already_is_told_as_that_with_its_proofs(tmp_path, dtype):
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    save_state(checkpoint.open_store(source), {"model": {"w": torch.randn(6, 4)}})
    command = ["reshard", source, target, "--to", "shard=2", *dtype]
    told(*command)
    again, dry = told(*command), told(*command, "--dry-run")
    for one in (again, dry):
        assert not one["is_new"] and one["written_bytes"] == 0
        assert one["proofs"] and one["notes"] == again["notes"]
    assert dry["read_bytes"] == again["read_bytes"]
    assert "already" in ask(*command, "--dry-run").output
    order = ConversionOrder(source=source, target=target, to="shard=2", dtype=dtype[1] if dtype else None)
    assert "already" in describe(carry_out(order))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_directory_of_something_else_does_not_become_a_store(places, tmp_path, dry):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for target, words in ((tmp_path / "mine", "notes.txt"), (tmp_path / "file" / "sub", "sub")):
        for verb, source in (("import", places["HF"]), ("reshard", places["STORE"])):
            done = ask(verb, source, str(target), *dry)
            assert done.exit_code == 1, done.output
            assert words in done.output
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_weights_that_a_cast_leaves_as_they_are_are_told(tmp_path):
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    weights = {"w": torch.randn(4, 4), "q": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_state(checkpoint.open_store(store), {"model": weights})
    for command in (["reshard", store, out + "1"], ["export", store, out + "2", "--format", "hf"]):
        again: list[list[str]] = [[]] if command[0] == "reshard" else []  # then it is there already
        for dry in (["--dry-run"], [], *again):
            notes = told(*command, "--dtype", "bf16", *dry)["notes"]
            assert any("1 tensors keep their type, float8_e4m3fn" in note for note in notes)


def test_a_dtype_of_rules_is_told_by_the_configuration(tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({"w": torch.randn(4, 4)}, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    (tmp_path / "rules.yaml").write_text(
        "rules: 1\nname: cast\nmap:\n  - {from: w, to: w, dtype: bfloat16}\n"
    )
    by_rules = ["--source-rules", str(tmp_path / "rules.yaml")]
    told("export", str(tmp_path / "hf"), str(tmp_path / "out"), "--format", "hf", *by_rules)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    told("import", str(tmp_path / "hf"), str(tmp_path / "store"), "--rules", str(tmp_path / "rules.yaml"))
    state = checkpoint.load(checkpoint.open_store(str(tmp_path / "store"))).state
    assert state["config"]["torch_dtype"] == "bfloat16"


def test_a_padded_tensor_of_no_rows_is_refused_by_its_size(tmp_path):
    save_file({"e": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "rules.yaml").write_text(
        "rules: 1\nname: padded\nsizes: {vocab: , total: 4}\nmap:\n"
        "  - {from: e, to: e, pad: {dim: 0, real: vocab, total: total}}\n"
    )
    given = ["--rules", str(tmp_path / "rules.yaml"), "--set", "vocab=0"]
    done = ask("import", str(tmp_path / "model.safetensors"), str(tmp_path / "out"), *given)
    assert done.exit_code == 2, done.output
    assert "vocab = 0 real elements" in " ".join(done.output.split())


def test_what_a_rehearsal_tells_to_the_byte_it_does_not_call_a_bound(places, tmp_path):
    exact = ask("export", places["STORE"], str(tmp_path / "out"), "--format", "hf", "--dry-run").output
    bound = ask("reshard", places["STORE"], str(tmp_path / "out"), "--dry-run").output
    assert "of buffers at most" in exact and "at most" in bound
    assert [line for line in exact.splitlines() if "written" in line and "at most" in line] == []
    assert [line for line in bound.splitlines() if "written" in line and "at most" in line] != []


class Stopped(Exception):
    """Ends a conversion in the middle."""


def test_a_pack_that_was_damaged_since_it_was_left_is_not_taken_over(tmp_path):
    torch.manual_seed(8)
    save_file({name: torch.randn(1 << 20) for name in "abcdef"}, tmp_path / "model.safetensors")
    store, settings = checkpoint.open_store(str(tmp_path / "store")), ConversionSettings(128 << 20)

    def stop_late(progress):
        if progress.num_done_bytes > 20 << 20:
            raise Stopped

    def import_(listener=lambda _: None):
        url = str(tmp_path / "model.safetensors")
        return checkpoint.import_foreign(
            url, store, checkpoint.Adoption(), settings=settings, listener=listener
        )

    with pytest.raises(Stopped):
        import_(stop_late)
    packs = sorted((tmp_path / "store" / "packs").iterdir())
    with packs[0].open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes([byte[0] ^ 0xFF]))
    resumed = import_().num_resumed_bytes
    assert ask("verify", str(tmp_path / "store")).exit_code == 0
    assert len(packs) == 1 or resumed > 0, "the others are taken over"
