"""Load-time resharding: what four ranks saved is loaded by three, beside torch's distributed checkpoints."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.bench.harness import Effort, Goal, Row, row

_SAVERS, _LOADERS = 4, 3
_TENSOR_MIB = 4


def reloading(effort: Effort) -> list[Row]:
    """Measure with worlds of real processes over gloo, in rounds that alternate; the page cache is warm."""
    num_tensors, wide, rounds = (4, 8, 3) if effort is Effort.QUICK else (16, 16, 7)
    size_mib = num_tensors * wide * _TENSOR_MIB
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
        Path(directory).chmod(0o700)
        for kind, size in (("save", _SAVERS), ("load", _LOADERS)):
            _run(kind, directory, size, [num_tensors, wide, rounds])
        told = json.loads((Path(directory) / "told.json").read_text())
    taken = told[0]["taken"]
    read = sum(one["read"] for one in told) / sum(one["needed"] for one in told)
    return [
        row(
            f"reshard at load time: shard=4 -> shard=3, {size_mib} MiB",
            "s",
            ours=median(taken["ours"]),
            peers={"dcp.load": median(taken["dcp"])},
            goal=Goal("<=", 0.5, "ratio"),
        ),
        row(
            "the same, fingerprints sampled",
            "s",
            ours=median(taken["sampled"]),
            peers={"dcp.load": median(taken["dcp"])},
        ),
        row("reshard at load time: bytes read, of those needed", "", ours=read, goal=Goal("<=", 1.05)),
    ]


def _run(kind: str, directory: str, size: int, numbers: list[int]) -> None:
    command = [sys.executable, "-m", "tests.bench.peers.reshard_rank", kind, directory]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), *map(str, numbers)], stderr=subprocess.PIPE)
        for rank in range(size)
    ]
    for process in ranks:
        _, complaint = process.communicate(timeout=600)
        if process.returncode:
            for one in ranks:
                one.kill()
            raise RuntimeError(f"a rank that was to {kind} failed: {complaint.decode()[-2000:]}")
