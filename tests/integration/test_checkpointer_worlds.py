"""Worlds of real processes: what four ranks saved goes on on three, then on two, bit for bit."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import Catalog, Checkpointer, Options, flatten_state, load, open_store, verify
from tests.fault.checkpoint_worlds import same_bits

pytestmark = pytest.mark.slow


def run(root: Path, worlds: list[str]) -> None:
    """Run worlds to their ends; every rank has to end well."""
    command = [sys.executable, "-m", "tests.integration.checkpointer_rank", str(root), *worlds]
    told = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert told.returncode == 0, told.stderr


def state_at(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / name, weights_only=True)
    return found


def test_training_goes_on_in_worlds_of_four_three_and_two_with_the_same_bits(tmp_path):
    (tmp_path / "keeper").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    worlds = [(4, 0, 3), (3, 3, 5), (2, 5, 6)]
    run(tmp_path, [":".join(map(str, world)) for world in worlds])
    for (_, before, reached), (size, _, _) in pairwise(worlds):
        left = state_at(tmp_path, f"at{reached}-from{before}-rank0")
        assert left["sharded/head.weight"].abs().sum() > 0 and left["epoch"] == reached
        for rank in range(size):
            assert same_bits(state_at(tmp_path, f"at{reached}-size{size}-rank{rank}"), left)
    notes = (tmp_path / "notes3-0").read_text()
    assert "rng was saved by 4 ranks, each its own, and 3 are here: left as it is" in notes
    store = open_store(str(tmp_path / "store"))
    read = [int((tmp_path / f"bytes3-{rank}").read_text()) for rank in range(3)]
    stored = sum(tensor.nbytes for tensor in flatten_state(load(store, 3).state).tensors.values())
    assert sum(read) < 1.6 * stored, "what several ranks want is read once, by one of them"
    assert Catalog(store).steps() == [3, 5, 6] and verify(store).num_bad == 0


def test_a_step_that_one_rank_cannot_read_is_passed_over_by_all(tmp_path):
    tmp_path.chmod(0o700)
    options = Options(arena_mib=1, lease_s=0.3, directory=tmp_path / "first")
    with Checkpointer(str(tmp_path / "store0"), options=options) as checkpointer:
        for step in (1, 2):
            ones = torch.ones(7, 3) * step
            checkpointer.save(step, {"plain": ones.flatten()[:5], "sharded": ones})
            assert checkpointer.wait()
    shutil.copytree(tmp_path / "store0", tmp_path / "store1")
    newest = max((tmp_path / "store1" / "packs").iterdir())
    newest.write_bytes(bytes(newest.stat().st_size))
    run(tmp_path, ["2"])
