"""Load-time resharding: what four ranks saved is loaded by three or six, beside torch's own checkpoints."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.harness import Effort, Goal, Row, row

_SAVERS = 4
_LOADERS = {"shard=3": (3, 1), "shard=3, tensor=2": (6, 2)}  # ranks, and how many of them share out columns
_TENSOR_MIB = 4


def reloading(effort: Effort) -> list[Row]:
    """Measure with worlds of real processes over gloo, in rounds that alternate; the page cache is warm.

    It is saved anew a few times: how its pages come to lie in memory makes a difference of up to a quarter.
    """
    num_tensors, wide, rounds, saves = (4, 8, 3, 1) if effort is Effort.QUICK else (16, 16, 5, 3)
    size_mib = num_tensors * wide * _TENSOR_MIB
    told: dict[str, list[Mapping[str, Any]]] = {layout: [] for layout in _LOADERS}
    for _ in range(saves):
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
            Path(directory).chmod(0o700)
            _run("save", directory, _SAVERS, [num_tensors, wide, rounds])
            for layout, (size, tensor) in _LOADERS.items():
                _run("load", directory, size, [num_tensors, wide, rounds, tensor])
                told[layout] += json.loads((Path(directory) / "told.json").read_text())
    rows = []
    for layout, ranks in told.items():
        rows += _rows(f"reshard at load time: shard=4 -> {layout}, {size_mib} MiB", ranks)
    return rows


def _rows(metric: str, told: Sequence[Mapping[str, Any]]) -> list[Row]:
    names = told[0]["taken"]  # of the slowest rank, as all have them
    taken = {name: median(second for one in told for second in one["taken"][name]) for name in names}
    read = sum(one["read"] for one in told) / sum(one["needed"] for one in told)
    dcp, plain = {"dcp.load": taken["dcp"]}, {"plain read": taken["plain"]}
    return [
        row(metric, "s", ours=taken["ours"], peers=dcp, goal=Goal("<=", 0.5, "ratio")),
        row(f"{metric}, against as many bytes read and not looked at", "s", ours=taken["ours"], peers=plain),
        row(f"{metric}: bytes read, of those needed", "", ours=read, goal=Goal("<=", 1.05)),
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
