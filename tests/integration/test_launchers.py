"""The stand-alone engine where its users run it: under torchrun, and in a notebook."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


def torchrun(directory: Path, last: int, doom: int = 0) -> None:
    directory.mkdir(mode=0o700)
    script = REPOSITORY / "tests" / "integration" / "launched.py"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--max-restarts=1", str(script), str(directory), str(last), str(doom)),
    ]
    # Without this the ranks that torchrun restarts meet in the store of those that died, for ever.
    apart = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, env=apart, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-6000:]


def test_what_torchrun_restarts_goes_on_where_it_was_and_ends_with_the_same_weights(tmp_path):
    torchrun(tmp_path / "quiet", last=6)
    torchrun(tmp_path / "killed", last=6, doom=4)
    for rank in (0, 1):
        assert (tmp_path / "quiet" / f"lives-{rank}").read_text() == "0 0\n"
        told = (tmp_path / "killed" / f"lives-{rank}").read_text()
        assert told in ("0 0\n1 3\n", "0 0\n1 2\n")  # step 3 may still have been on its way
    quiet, killed = (torch.load(tmp_path / name / "weights-6") for name in ("quiet", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in quiet.items())


TRAIN = """
    import asyncio
    import torch
    from checkpoint import Checkpointer, Options

    assert asyncio.get_event_loop().is_running()  # as in every notebook
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = dict(model=model, optimizer=optimizer)
    checkpointer = Checkpointer({store!r}, options=Options(lease_s=1.0, directory={keeper!r}, arena_mib=8))
    for step in (1, 2, 3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        saving = checkpointer.save(step, state)
    print(saving.durable().result(60).step)
"""
RESTORE = """
    import torch
    from checkpoint import Checkpointer, Options

    torch.manual_seed(1)
    model = torch.nn.Linear(4, 4)
    with Checkpointer({store!r}, options=Options(directory={keeper!r}, arena_mib=8)) as checkpointer:
        print(checkpointer.restore(dict(model=model)).step, model.weight.double().sum().item())
"""


def run(tmp_path: Path, *cells: str) -> list[str]:
    """Run cells in a kernel of their own; return what each printed."""
    places = {"store": str(tmp_path / "store"), "keeper": str(tmp_path / "keeper")}
    sources = [textwrap.dedent(cell).format(**places) for cell in cells]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    done = NotebookClient(book, timeout=120, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    return ["".join(out.get("text", "") for out in cell.outputs).strip() for cell in done.cells]


def test_a_notebook_saves_and_after_its_kernel_was_restarted_restores(tmp_path):
    tell = "print(model.weight.double().sum().item())"
    last, told = run(tmp_path, TRAIN, tell)
    assert last == "3"
    (restored,) = run(tmp_path, RESTORE)
    assert restored == f"3 {told}"


def test_a_cell_that_is_run_again_is_told_that_its_steps_are_there(tmp_path):
    with pytest.raises(CellExecutionError, match="Conflict"):
        run(tmp_path, TRAIN, TRAIN)
