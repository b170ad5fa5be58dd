"""What `--dry-run` tells comes true."""

from pathlib import Path

import pytest
import torch

import checkpoint
from tests.conversion_samples import adam_state, block_weights, save_state
from tests.interop.unpacking import unpack
from tests.unit.test_cli_conversions import told


def check(verb: str, origin: str, target: Path, *options: str) -> None:
    """Rehearse a conversion, do it, and hold the one against the other."""
    arguments = [verb, origin, str(target), *options, "--memory-budget", "256MiB"]
    planned = told(*arguments, "--dry-run")
    assert not target.exists()
    done = told(*arguments)
    assert planned["read_bytes"] == done["read_bytes"] > 0, arguments
    assert planned["peak_bytes"] == done["peak_bytes"] <= 256 << 20, arguments
    if verb == "export":
        size = sum(one.stat().st_size for one in target.rglob("*") if one.is_file())
        assert planned["written_bytes"] == done["written_bytes"] == size, arguments
    else:
        assert planned["written_bytes"] >= done["written_bytes"] > 0, arguments


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("made") / "store")
    save_state(checkpoint.open_store(url), adam_state(block_weights()))
    return url


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "dcp"),
        ("--format", "torch"),
        ("--format", "hf"),
        ("--format", "hf", "--dtype", "bf16"),
        ("--format", "megatron", "--only", "model/*"),
        ("--format", "deepspeed-universal"),
    ],
)
def test_a_rehearsed_export_tells_what_is_then_read_and_written_and_the_budget(source, tmp_path, options):
    check("export", source, tmp_path / "out", *options)


@pytest.mark.parametrize(
    "options", [(), ("--to", "shard=3"), ("--dtype", "bf16", "--to", "replica=2,zero=3")]
)
def test_a_planned_resharding_tells_what_is_then_read_and_at_most_written(source, tmp_path, options):
    check("reshard", source, tmp_path / "out", *options)


@pytest.mark.parametrize("spread", ["replica=1,zero=1", "replica=4,zero=2", "replica=13,zero=3"])
def test_an_export_to_many_ranks_of_zero_is_told_with_its_padding(tmp_path, spread):
    ours, _ = unpack("zero2-bf16-3", tmp_path)
    check("export", str(ours), tmp_path / "out", "--format", "deepspeed", "--to", spread)
    stored = str(tmp_path / "stored")
    told("import", str(ours), stored)
    check("export", stored, tmp_path / "again", "--format", "deepspeed", "--to", spread)


def test_what_comes_from_a_foreign_file_is_told_as_well(tmp_path):
    torch.save({"w": torch.randn(600, 500), "b": torch.randn(500)}, tmp_path / "a.pt")
    check("export", str(tmp_path / "a.pt"), tmp_path / "hf", "--format", "hf")
    check("export", str(tmp_path / "a.pt"), tmp_path / "torch", "--format", "torch", "--dtype", "fp16")
    check("import", str(tmp_path / "a.pt"), tmp_path / "store")


def test_large_tensors_in_many_chunks_are_told_block_by_block(tmp_path):
    torch.manual_seed(4)
    state = {
        "model": {"h.0.w": torch.randn(3000, 1100), "h.1.w": torch.zeros(1 << 22), "h.1.b": torch.ones(3)}
    }
    save_state(checkpoint.open_store(str(tmp_path / "large")), state)
    for number, options in enumerate(
        [("reshard", "--to", "tensor=3"), ("export", "--format", "dcp"), ("export", "--format", "hf")]
    ):
        check(options[0], str(tmp_path / "large"), tmp_path / f"to{number}", *options[1:])
