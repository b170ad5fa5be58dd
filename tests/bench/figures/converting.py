"""Converting: how fast, in how much memory, and how little is read twice."""

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import checkpoint
from tests.bench.harness import Effort, Row, row
from tests.conversion_samples import save_state

_BUDGET_BYTES = 256 << 20


def converting(effort: Effort) -> list[Row]:
    """Reshard a state of several layers beside a plain copy of the same store's files, in turns."""
    num_tensors, rounds = (8, 1) if effort is Effort.QUICK else (32, 3)
    ours, copies = list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
        root = Path(directory)
        source = checkpoint.open_store(str(root / "source"))
        weights = {f"layers.{number}.weight": torch.randn(4096, 1024) for number in range(num_tensors)}
        save_state(source, {"model": weights})
        settings = checkpoint.ConversionSettings(_BUDGET_BYTES)
        change = checkpoint.Change(to="shard=3,tensor=2")
        report = None
        for number in range(rounds):
            target = checkpoint.open_store(str(root / f"target{number}"))
            report = checkpoint.reshard(source, target, change, settings=settings)
            ours.append(report.seconds)
            started = time.perf_counter()
            shutil.copytree(root / "source", root / f"copy{number}")
            copies.append(time.perf_counter() - started)
        stored = sum(entry.num_bytes for entry in source.list("packs/"))
    if report is None:
        return []
    size_mib = report.num_bytes >> 20
    return [
        row(
            f"reshard: {size_mib} MiB into shard=3,tensor=2, proved, synced",
            "s",
            ours=median(ours),
            peers={"copytree, not synced": median(copies)},
        ),
        row("reshard: bytes read, of those stored", "", ours=report.read_bytes / stored),
        row("reshard: the process grew, of its budget", "", ours=report.grown_bytes / _BUDGET_BYTES),
    ]
