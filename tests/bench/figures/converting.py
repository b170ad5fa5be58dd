"""Converting: how fast, in how much memory, and how little is read twice."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import checkpoint
from tests.bench.harness import Effort, Goal, Row, row
from tests.conversion_samples import save_state

_BUDGET_MIB = 256
_PATIENCE_S = 300


def converting(effort: Effort) -> list[Row]:
    """Reshard a state of several layers beside a plain copy of the same store's files, in turns."""
    num_tensors, rounds = (8, 1) if effort is Effort.QUICK else (32, 3)
    copies = list[float]()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
        root = Path(directory)
        source = checkpoint.open_store(str(root / "source"))
        weights = {f"layers.{number}.weight": torch.randn(4096, 1024) for number in range(num_tensors)}
        save_state(source, {"model": weights})
        reports = list[dict[str, Any]]()
        for number in range(rounds):
            reports.append(_reshard(root / "source", root / f"target{number}"))
            started = time.perf_counter()
            shutil.copytree(root / "source", root / f"copy{number}")
            copies.append(time.perf_counter() - started)
        stored = sum(entry.num_bytes for entry in source.list("packs/"))
    return [
        row(
            f"reshard: {reports[0]['num_bytes'] >> 20} MiB into shard=3,tensor=2, proved, synced",
            "s",
            ours=median(each["seconds"] for each in reports),
            peers={"copytree, not synced": median(copies)},
        ),
        row("reshard: bytes read, of those stored", "", ours=reports[0]["read_bytes"] / stored),
        row(
            f"reshard: the process grew, of its budget of {_BUDGET_MIB} MiB",
            "",
            ours=max(each["grown_bytes"] for each in reports) / (_BUDGET_MIB << 20),
            goal=Goal("<=", 1.0),
        ),
    ]


def _reshard(source: Path, target: Path) -> dict[str, Any]:
    """Reshard in a process of its own, whose growth is then the conversion's; return what it reports."""
    options = ("--to", "shard=3,tensor=2", "--memory-budget", f"{_BUDGET_MIB}MiB", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "reshard", str(source), str(target), *options],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the conversion ended with {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))
