"""The manual's code runs, block after block, and its commands work."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checkpoint import Catalog, open_store, tags, verify
from flows.cli import app

MANUAL = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_manual_of_checkpoints_works_from_top_to_bottom(tmp_path):
    text = MANUAL.read_text().replace("/mnt/", f"{tmp_path}/")
    names: dict[str, object] = {"torch": torch, "print": lambda *_: None}
    kinds = []
    for kind, block in BLOCK.findall(text):
        kinds.append(kind)
        if kind == "python":
            exec(compile(block, str(MANUAL), "exec"), names)
            continue
        for line in block.splitlines():
            done = CliRunner().invoke(app, line.split()[1:])
            assert done.exit_code == 0, f"{line}: {done.output}"
    assert kinds.count("sh") == 2 and kinds.count("python") == 8
    near, far = open_store(str(tmp_path / "near" / "mine")), open_store(str(tmp_path / "far" / "mine"))
    assert Catalog(near).steps() == [30, 40] and tags(near) == {"best": 40}
    assert set(Catalog(far).steps()) >= {30, 40} and verify(far).is_sound
