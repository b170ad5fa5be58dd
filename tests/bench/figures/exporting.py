"""From a torch distributed checkpoint to safetensors: beside torch's own two ways, and a plain copy."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.harness import Effort, Goal, Row, row
from tests.bench.peers.export_job import BUDGET_BYTES, WAYS

_LAYER_MIB = 16
_PATIENCE_S = 300
_PEERS = {"format_utils": "torch's format_utils + safetensors", "consolidation": "torch's HF consolidation"}


def exporting(effort: Effort) -> list[Row]:
    """Convert the same checkpoint every way, in turns, each time in a process of its own."""
    num_layers, rounds = (16, 1) if effort is Effort.QUICK else (64, 3)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        source = Path(folder) / "dcp"
        _job("make", str(num_layers), str(source))
        for _ in range(rounds):
            for way, told in found.items():
                told.append(json.loads(_job(way, str(source), f"{folder}/{way}")))
    what = f"dcp -> hf, {num_layers * _LAYER_MIB} MiB, synced"
    of = {way: {key: median(one[key] for one in told) for key in told[0]} for way, told in found.items()}
    best = min(of[way]["seconds"] for way in _PEERS)
    # Twice as fast as torch, or as fast as the disk lets one be: 0.8 of the rate of a copy.
    allowed = max(0.5 * best, of["copy"]["seconds"] / 0.8)
    return [
        row(
            what,
            "s",
            ours=of["ours"]["seconds"],
            peers={title: of[way]["seconds"] for way, title in _PEERS.items()},
        ),
        row(
            f"{what}: of half of torch's best or 1.25 of a copy, the longer",
            "",
            ours=of["ours"]["seconds"] / allowed,
            goal=Goal("<=", 1.0),
        ),
        row(
            f"{what}: processor",
            "s",
            ours=of["ours"]["cpu_s"],
            peers={title: of[way]["cpu_s"] for way, title in _PEERS.items()},
        ),
        row(
            f"{what}: of the time of a plain copy",
            "",
            ours=of["ours"]["seconds"] / of["copy"]["seconds"],
        ),
        row(
            f"{what}: the process grew, of the budget of {BUDGET_BYTES >> 20} MiB",
            "",
            ours=of["ours"]["grown_bytes"] / BUDGET_BYTES,
            peers={title: of[way]["grown_bytes"] / BUDGET_BYTES for way, title in _PEERS.items()},
            goal=Goal("<=", 1.0),
        ),
    ]


def _job(*arguments: str) -> str:
    """Return what a process says on its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.peers.export_job", *arguments],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]
