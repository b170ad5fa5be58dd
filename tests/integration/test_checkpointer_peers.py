"""The stand-alone API on several hosts: a lost one's memory is rebuilt, and no store is ever read."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def keeper_pid(root: Path, host: str) -> int:
    return int((root / f"keeper-{host}" / "life.lock").read_text())


@contextmanager
def world(root: Path, hosts: list[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Run a world until all its ranks have restored and are protected; then SIGKILL its ranks."""
    for host in hosts:
        (root / f"told-{host}.json").unlink(missing_ok=True)
    with open(root / "ranks.log", "ab") as log:
        command = [sys.executable, "-m", "tests.integration.peer_rank", str(root), *hosts]
        ranks = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    try:
        while not all((root / f"told-{host}.json").exists() for host in hosts):
            assert ranks.poll() is None and time.monotonic() < deadline, (root / "ranks.log").read_text()
            time.sleep(0.05)
        time.sleep(0.1)
        yield {host: json.loads((root / f"told-{host}.json").read_text()) for host in hosts}
    finally:
        ranks.terminate()
        ranks.wait(20)


def test_a_world_goes_on_from_its_hosts_memories_after_one_is_lost_with_its_keeper(tmp_path):
    tmp_path.chmod(0o700)
    names = ["m0", "m1", "m2", "m3"]
    try:
        (tmp_path / "round").write_text("1")
        with world(tmp_path, names[:3]) as told:
            first = told["m0"]["protected"]
            assert [one["step"] for one in told.values()] == [0, 0, 0]
        os.kill(keeper_pid(tmp_path, "m2"), signal.SIGKILL)
        (tmp_path / "round").write_text("2")
        with world(tmp_path, ["m0", "m1", "m3"]) as told:  # another machine in its place
            for one in told.values():
                assert one["step"] >= first and one["same"], told
                assert set(one["sources"]) <= {"memory", "peers", "parity"}
            assert sum(one["sources"].get("parity", 0) for one in told.values()) > 0
            assert any("host m2" in note for one in told.values() for note in one["notes"])
            second = told["m0"]["protected"]
        (tmp_path / "round").write_text("3")
        with world(tmp_path, names[:2]) as told:  # nobody lost: m3's keeper lives on without a trainer
            assert all(one["step"] >= second and one["same"] for one in told.values()), told
            assert not any("parity" in one["sources"] for one in told.values())
        assert not (tmp_path / "store" / "manifests").exists()
    finally:
        for name in names:
            with suppress(OSError, ValueError):
                os.kill(keeper_pid(tmp_path, name), signal.SIGKILL)
