"""Real ranks of which one meets what the others do not: all hear of it, and none is left waiting."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import Checkpointer, Codec, Options, SavePolicy
from tests.integration.apart_rank import SHAPE

pytestmark = pytest.mark.slow


def values(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def root(tmp_path):
    """A place with two stores, of the same run and steps, of other content."""
    tmp_path.chmod(0o700)
    for name, seed in (("store", 0), ("other", 100)):
        kept = tmp_path / f"keeper-{name}"
        kept.mkdir(mode=0o700)
        options = Options(saving=SavePolicy(codec=Codec.RAW), lease_s=0.3, directory=kept)
        with Checkpointer(str(tmp_path / name), run="run", options=options) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, {"w": values(seed + step)})
                assert checkpointer.wait()
    return tmp_path


def met(root: Path, story: str) -> list[Any]:
    """Let two ranks play a story; return what each met."""
    command = [sys.executable, "-m", "tests.integration.apart_rank", str(root)]
    ranks = [subprocess.Popen([*command, str(rank), story]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [json.loads((root / f"met{rank}").read_text()) for rank in range(2)]


def test_what_lies_column_by_column_in_memory_is_proved_together_with_the_others(root):
    assert met(root, "columns") == [2, 2], "the newest step is sound"
    halves = [torch.load(root / f"half{rank}") for rank in range(2)]
    assert torch.equal(torch.cat(halves, dim=1), values(2))


def test_a_target_that_cannot_be_filled_on_one_rank_is_told_on_both(root):
    first, second = met(root, "expanded")
    assert "Mismatch" in first and second.startswith("Mismatch: ")


def test_what_is_no_error_of_a_checkpoint_is_told_on_all_ranks_too(root):
    first, second = met(root, "exhausted")
    assert first == "CheckpointError: rank 1: MemoryError: no room" and second == "MemoryError: no room"


def test_ranks_that_find_different_checkpoints_of_one_step_restore_none(root):
    assert all("different checkpoints of step" in one for one in met(root, "elsewhere"))


def test_tied_tensors_that_one_rank_holds_come_back(root):
    assert met(root, "tied") == [66.0, 0.0], "the other rank has none"
