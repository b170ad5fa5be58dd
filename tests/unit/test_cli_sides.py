"""Each side of a command has its own rules and sizes; copies that differ are nothing to compare."""

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from tests.conversion_samples import adam_state, block_weights, save_state
from tests.interop.unpacking import rewrite
from tests.resharding_matrix import MODELS, make_truth
from tests.unit.test_cli_conversions import ask, told

NAME, SIZES = MODELS["Llama"]
MODEL = ["--only", "model/*"]


def words(option: str, **more: int) -> list[str]:
    return [word for key, value in {**SIZES, **more}.items() for word in (option, f"{key}={value}")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> str:
    """Return Megatron's files of two tensor ranks; beside them is a Hugging Face model, "hf"."""
    folder = tmp_path_factory.mktemp("sides")
    store, ranks = str(folder / "store"), str(folder / "ranks")
    checkpoint.promote(make_truth("Llama").store, checkpoint.open_store(store), 9)
    spread = ["--rules", NAME, *words("--set"), "--to", "tensor=2"]
    told("export", store, ranks, "--format", "megatron", *spread, *MODEL)
    told(
        "export", store, str(folder / "hf"), "--format", "hf", "--rules", "llama-hf", *words("--set"), *MODEL
    )
    return ranks


def test_two_frameworks_files_are_compared_each_by_its_own_rules(ranks):
    model = str(Path(ranks).with_name("hf"))
    sides = ["--rules", NAME, *words("--set"), "--other-rules", "llama-hf", *words("--other-set")]
    compared = told("diff", ranks, model, *sides)
    assert len(compared) == 21
    assert {each["verdict"] for each in compared} == {"equal"}
    swapped = ["--rules", "llama-hf", *words("--set"), "--other-rules", NAME, *words("--other-set")]
    assert {each["verdict"] for each in told("diff", model, ranks, *swapped)} == {"equal"}
    assert ask("diff", ranks, model, "--rules", NAME, "--other-set", "vocab=13").exit_code == 2


def test_copies_that_differ_are_an_error_of_diff_too(ranks, tmp_path):
    other = tmp_path / "other"
    told("export", ranks, str(other), "--format", "megatron", "--source-rules", NAME, *words("--source-set"),
         "--rules", NAME, *words("--set"), "--to", "tensor=2")  # fmt: skip
    by_rules = ["--rules", NAME, *words("--set")]
    assert {each["verdict"] for each in told("diff", ranks, str(other), *by_rules)} == {"equal"}

    def change(tree: Any) -> None:
        tree["model"]["decoder.final_layernorm.weight"] += 1

    rewrite(next(other.rglob("mp_rank_01/*.pt")), change)
    done = ask("diff", ranks, str(other), *by_rules)
    assert done.exit_code == 1
    assert "model/final_norm.weight': the copies in" in " ".join(done.output.split())


def test_sizes_go_to_the_rules_that_they_are_told_for(ranks, tmp_path):
    read = ["--source-rules", NAME, *words("--source-set")]
    written = ["--rules", NAME, *words("--set", padded_vocab=20), "--to", "tensor=2"]
    told("export", ranks, str(tmp_path / "wider"), "--format", "megatron", *read, *written)
    rows = {
        each["shape"][0]
        for each in told("inspect", str(tmp_path / "wider"))["tensors"]
        if each["name"] == "embedding.word_embeddings.weight"
    }
    assert rows == {10}
    done = ask("export", ranks, str(tmp_path / "no"), "--format", "hf", "--source-set", "layers=2")
    assert done.exit_code == 2
    assert "--source-rules" in done.output


def test_sizes_that_reshard_was_told_are_the_checkpoint_s_from_then_on(ranks, tmp_path):
    store, cut, out = (str(tmp_path / name) for name in ("store", "cut", "out"))
    checkpoint.promote(make_truth("Llama").store, checkpoint.open_store(store), 9)
    told("reshard", store, cut, "--to", "tensor=2", "--rules", NAME, *words("--set"))
    padded = ["--set", f"padded_vocab={SIZES['padded_vocab']}", "--to", "tensor=2", *MODEL]
    told("export", cut, out, "--format", "megatron", "--rules", NAME, *padded)
    assert {each["verdict"] for each in told("diff", ranks, out, "--rules", NAME)} == {"equal"}


@pytest.mark.parametrize("verb", ["export", "import", "reshard"])
def test_a_dry_run_says_that_its_target_is_taken(verb, ranks, tmp_path):
    store, other = str(Path(ranks).with_name("store")), tmp_path / "taken"
    options = {
        "export": ["--format", "hf", *MODEL],
        "import": ["--format", "hf", "--step", "9"],
        "reshard": [],
    }
    source = str(Path(ranks).with_name("hf")) if verb == "import" else store
    if verb == "export":
        other.mkdir()
        (other / "file").write_bytes(b"x")
    else:
        told("reshard", store, str(other), "--only", "model/final_norm*")
    done = ask(verb, source, str(other), *options[verb], "--dry-run")
    assert done.exit_code == 1, done.output
    assert "AlreadyExists" in ask(verb, source, str(other), *options[verb], "--dry-run", "--json").output


def test_a_step_is_the_second_ones_too_if_it_is_a_store_and_none_is_passed_over(tmp_path):
    source = str(tmp_path / "source")
    for step in (3, 4):
        save_state(checkpoint.open_store(source), adam_state(block_weights()), step=step)
    foreign = str(tmp_path / "foreign.pt")
    torch.save(checkpoint.load(checkpoint.open_store(source), 3).state["model"], foreign)
    assert ask("diff", source, foreign, "--step", "3").exit_code == 1, "the optimizer is missing"
    assert "no step 4" in ask("diff", source, foreign, "--step", "3", "--other-step", "4").output
    held = ("--other-step", "4", "--other-format", "torch")
    assert "no step 4" in ask("diff", source, foreign, *held).output, "and nothing is passed over in silence"
