"""Who ends a program without closing anything still finds the newest save; and nothing makes the end hang."""

import subprocess
import sys
import time

import pytest

from checkpoint import Catalog, open_store
from tests.fault.leaving_trainer import ENDS

pytestmark = pytest.mark.slow


def test_the_newest_save_survives_every_way_a_program_can_end_but_a_kill(tmp_path):
    command = [sys.executable, "-m", "tests.fault.leaving_trainer", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 20

    def saved() -> dict[str, int | None]:
        return {end: Catalog(open_store(str(tmp_path / end))).latest() for end in ENDS}

    expected = {end: None if end == "stuck" else 1 for end in ENDS}
    while saved() != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved() == expected
    assert "before its newest checkpoint was safe" in done.stderr
