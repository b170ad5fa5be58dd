"""The manual of conversions runs, block after block, commands and code."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import checkpoint
from flows.cli import app
from tests.conversion_samples import adam_state, save_state

MANUAL = Path(__file__).parents[2] / "docs" / "resharding.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_manual_of_conversions_works_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    save_state(checkpoint.open_store("made"), adam_state(model.state_dict()))
    kinds = []
    for kind, block in BLOCK.findall(MANUAL.read_text()):
        kinds.append(kind)
        if kind == "python":
            exec(compile(block, str(MANUAL), "exec"), {"torch": torch})
            continue
        for line in block.splitlines():
            done = CliRunner().invoke(app, shlex.split(line)[1:])
            assert done.exit_code == 0, f"{line}: {done.output}"
    assert kinds == ["sh", "sh", "sh", "python", "sh", "python"]
