"""Real ranks, each of which wants half of every row: each byte is read once, and all of it is proved."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import Checkpointer, Codec, Options, SavePolicy
from checkpoint.format.fingerprint import fingerprinted_by
from tests.integration.parts_rank import SHAPE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fingerprinted_by() == "numpy", reason="no compiled code here"),
]
HALF_BYTES = SHAPE[0] * SHAPE[1] * 4 // 2


def values(step: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))


@pytest.fixture
def root(tmp_path):
    """A place where steps 1 and 2 were saved by one process."""
    tmp_path.chmod(0o700)
    (tmp_path / "keeper").mkdir(mode=0o700)
    options = Options(saving=SavePolicy(codec=Codec.RAW), lease_s=0.3, directory=tmp_path / "keeper")
    with Checkpointer(str(tmp_path / "store"), options=options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": values(step)})
            assert checkpointer.wait()
    return tmp_path


def run(root: Path, story: str, num_ranks: int = 2) -> list[int]:
    """Let the ranks restore; return how they ended."""
    command = [sys.executable, "-m", "tests.integration.parts_rank", str(root)]
    ranks = [subprocess.Popen([*command, str(rank), story]) for rank in range(num_ranks)]
    return [rank.wait(timeout=100) for rank in ranks]


def told(root: Path, num_ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((root / f"told{rank}").read_text()) for rank in range(num_ranks)]


def restored(root: Path, first: int = 0) -> torch.Tensor:
    return torch.cat([torch.load(root / f"half{rank}") for rank in (first, first + 1)], dim=1)


def test_two_ranks_read_each_byte_once(root):
    assert run(root, "plain") == [0, 0]
    assert torch.equal(restored(root), values(2))
    assert [one["num_bytes"] for one in told(root)] == [HALF_BYTES, HALF_BYTES]


def test_of_replicas_that_want_the_same_half_one_reads_each_byte(root):
    assert run(root, "replicas", num_ranks=4) == [0] * 4
    assert torch.equal(restored(root), values(2)) and torch.equal(restored(root, first=2), values(2))
    assert sum(one["num_bytes"] for one in told(root, num_ranks=4)) == 2 * HALF_BYTES


@pytest.mark.parametrize("column", [5, SHAPE[1] - 5])
def test_a_flipped_bit_in_either_half_makes_both_fall_back_and_names_the_chunk(root, column: int):
    pack = max((root / "store" / "packs").iterdir())
    data = bytearray(pack.read_bytes())
    data[data.index(values(2).numpy().tobytes()[:64]) + (77 * SHAPE[1] + column) * 4] ^= 1
    pack.write_bytes(data)
    assert run(root, "plain") == [0, 0]
    assert torch.equal(restored(root), values(1))
    for one in told(root):
        assert one["step"] == 1 and len(one["why"]) == 1 and "a chunk of 'w'" in one["why"][0]


def test_who_outlives_a_rank_that_dies_while_it_reads_believes_nothing(root):
    ends = run(root, "dies")
    assert ends[1] < 0 and ends[0] != 0
    assert not (root / "told0").exists()
