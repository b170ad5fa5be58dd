"""What `--dry-run` tells comes true."""

import torch

import checkpoint
from tests.conversion_samples import adam_state, block_weights, save_state
from tests.unit.test_cli_conversions import told


def test_a_dry_run_tells_what_is_then_read_and_written_and_the_budget(tmp_path):
    source = str(tmp_path / "made")
    save_state(checkpoint.open_store(source), adam_state(block_weights()))
    torch.save({"w": torch.randn(600, 500), "b": torch.randn(500)}, tmp_path / "a.pt")
    for number, (verb, origin, *options) in enumerate(
        [
            ("export", source, "--format", "dcp"),
            ("export", source, "--format", "hf", "--dtype", "bf16"),
            ("export", str(tmp_path / "a.pt"), "--format", "hf"),
            ("export", str(tmp_path / "a.pt"), "--format", "torch", "--dtype", "fp16"),
            ("import", str(tmp_path / "a.pt")),
        ]
    ):
        arguments = [verb, origin, str(tmp_path / f"to{number}"), *options, "--memory-budget", "256MiB"]
        planned, done = told(*arguments, "--dry-run"), told(*arguments)
        assert planned["read_bytes"] == done["read_bytes"], arguments
        assert planned["written_bytes"] >= done["written_bytes"] > 0, arguments
        assert planned["peak_bytes"] == done["peak_bytes"] <= 256 << 20, arguments
