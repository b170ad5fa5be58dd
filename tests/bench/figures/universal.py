"""From ZeRO to DeepSpeed's universal folders: beside DeepSpeed's own converter, and a plain copy."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.figures.session import ROOT, console
from tests.bench.harness import Effort, Goal, Row, row
from tests.bench.peers.universal_job import BUDGET_BYTES, WAYS

DEEPSPEED_PYTHON = ROOT / ".venv-deepspeed" / "bin" / "python"
_PATIENCE_S = 300
_PEER = "DeepSpeed's ds_to_universal"


def universal(effort: Effort) -> list[Row]:
    """Convert the same checkpoint every way, in turns, each time in a process of its own."""
    if not DEEPSPEED_PYTHON.exists():
        console.print("no .venv-deepspeed: without this figure, whose source it makes (`make deepspeed`)")
        return []
    num_layers, rounds = (4, 1) if effort is Effort.QUICK else (15, 5)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        source = Path(folder) / "zero"
        _job("make", str(source), str(num_layers))
        for number in range(rounds):
            ways = list(WAYS)
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                found[way].append(json.loads(_job(way, str(source), f"{folder}/{way}")))
    of = {way: {key: median(one[key] for one in told) for key in told[0]} for way, told in found.items()}
    return _rows(of)


def _rows(of: dict[str, dict[str, float]]) -> list[Row]:
    what = f"zero -> universal, {of['ours']['num_bytes'] / (1 << 20):.0f} MiB, synced"

    def beside(metric: str, way: str, key: str, goal: Goal | None = None) -> Row:
        unit = "s" if key.endswith("s") and not key.endswith("bytes") else "MiB"
        scale = 1.0 if unit == "s" else 1 << 20
        peers = {_PEER: of["theirs"][key] / scale}
        return row(f"{what}: {metric}", unit, ours=of[way][key] / scale, peers=peers, goal=goal)

    thrice = Goal("<=", 1 / 3, of="ratio")
    grown = max(of[way]["grown_bytes"] for way in ("ours", "proved"))
    return [
        beside("both unproved", "ours", "seconds", thrice),
        beside("ours proved", "proved", "seconds", thrice),
        beside("processor", "ours", "cpu_s"),
        beside("temporary files", "ours", "temporary_bytes", Goal("<=", 0.5, of="ratio")),
        beside("the most memory of a process", "proved", "peak_bytes"),
        row(f"{what}: of the time of a plain copy", "", ours=of["ours"]["seconds"] / of["copy"]["seconds"]),
        row(
            f"{what}: the process grew, of the budget of {BUDGET_BYTES >> 20} MiB",
            "",
            ours=grown / BUDGET_BYTES,
            peers={_PEER: of["theirs"]["grown_bytes"] / BUDGET_BYTES},
            goal=Goal("<=", 1.0),
        ),
    ]


def _job(way: str, *arguments: str) -> str:
    """Return what a process says on its last line."""
    python = str(DEEPSPEED_PYTHON) if way in ("make", "theirs") else sys.executable
    done = subprocess.run(
        [python, "-m", "tests.bench.peers.universal_job", way, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{way} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]
