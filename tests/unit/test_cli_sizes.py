"""Sizes of a model on the command line: told once, they go along."""

import checkpoint
from tests.resharding_matrix import MODELS, make_truth
from tests.unit.test_cli_conversions import ask, told


def test_sizes_that_were_told_once_or_that_files_tell_go_along(tmp_path):
    truth = make_truth("Llama")
    name, given = MODELS["Llama"]
    sizes = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    store, ranks, back, again, model, cut = (str(tmp_path / one) for one in ("s", "r", "b", "a", "m", "c"))
    checkpoint.promote(truth.store, checkpoint.open_store(store), 9)
    rules, spread = ["--rules", name], ["--to", "tensor=2", "--only", "model/*"]
    assert "has to be told the size" in ask("export", store, ranks, "--format", "megatron", *rules).output
    told("export", store, ranks, "--format", "megatron", *rules, *sizes, *spread)
    told("import", ranks, back, *rules)
    told("export", back, again, "--format", "megatron", *rules, "--to", "pipeline=2")
    told("export", again, model, "--format", "hf", "--source-rules", name, "--rules", "llama-hf")
    padded = [*rules, "--set", f"padded_vocab={given['padded_vocab']}", "--to", "tensor=2"]
    told("reshard", back, cut, *padded)
    told("export", cut, str(tmp_path / "last"), "--format", "megatron", *padded)
    assert told("plan", cut, *padded)["num_ranks"] == 2
    assert {each["verdict"] for each in told("diff", ranks, str(tmp_path / "last"), *rules)} == {"equal"}
    layers = ["--set", "layers=7"]
    assert ask("export", back, str(tmp_path / "no"), "--format", "megatron", *rules, *layers).exit_code == 2
    halved = {"heads": 4, "kv_heads": 2, "head_dim": 4}  # as many elements; 8, 4 and 2 it has
    others = [word for key, value in halved.items() for word in ("--set", f"{key}={value}")]
    notes = told("import", ranks, str(tmp_path / "halved"), *rules, *others)["notes"]
    assert any("heads=4 was given, but the files say 8" in note for note in notes)
