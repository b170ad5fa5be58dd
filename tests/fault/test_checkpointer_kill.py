"""SIGKILL of a training loop: its successor goes on from the keeper's memory, which no store ever got."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from checkpoint import Catalog, open_store, verify
from tests.fault.checkpoint_worlds import same_bits
from tests.fault.checkpointer_trainer import EVERY, checkpointer, make, train

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path):
    tmp_path.chmod(0o700)

    yield tmp_path
    with suppress(OSError, ValueError):
        os.kill(int((tmp_path / "keeper" / "life.lock").read_text()), signal.SIGKILL)


def diary(root: Path) -> list[int]:
    path = root / "diary"
    return [int(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_a_killed_loop_goes_on_from_memory_with_what_it_captured_last(root):
    command = [sys.executable, "-m", "tests.fault.checkpointer_trainer", str(root)]
    trainer = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(diary(root)) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    captured = diary(root)[-1]
    again = make()
    with checkpointer(root) as checkpoints:
        restored = checkpoints.restore(again)
        assert restored is not None and restored.step >= captured
        assert restored.report.bytes_by_source.keys() == {"memory"}
        expected, threads = make(), torch.get_num_threads()
        torch.set_num_threads(1)
        for step in range(1, restored.step + 1):
            train(expected, step)
        torch.set_num_threads(threads)
        for name in ("model", "optimizer", "scheduler"):
            assert same_bits(again[name].state_dict(), expected[name].state_dict())
        train(again, restored.step + 1)
        saving = checkpoints.save(restored.step + 1, again, depth="store")
        assert saving is not None and saving.durable().result(30).tier == "store"
    store = open_store(str(root / "store"))
    assert all(step % EVERY == 0 or step == restored.step + 1 for step in Catalog(store).steps())
    assert verify(store).num_bad == 0
