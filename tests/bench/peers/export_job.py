"""One way from a torch distributed checkpoint to safetensors, in a process of its own, timed.

    python -m tests.bench.peers.export_job WAY SOURCE TARGET      writes {"seconds", "cpu_s", "grown_bytes"}

Every way ends with its files on the disk (fsync).
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.known import open_foreign, write_foreign

BUDGET_BYTES = 256 << 20


def high_water_bytes() -> int:
    """Return the most memory that was resident so far: of this process, not of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def make(target: Path, num_layers: int) -> None:
    """Write a model as torch does, in as many files as four ranks would."""
    model = {f"layers.{number}.weight": torch.randn(4096, 1024) for number in range(num_layers)}
    save({"model": model}, storage_writer=FileSystemWriter(target, thread_count=4))


def ours(source: Path, target: Path) -> None:
    """Convert block by block."""
    with drafting(str(target), "bench") as draft:
        write_foreign("hf", draft, open_foreign(str(source)), BUDGET_BYTES)


def format_utils(source: Path, target: Path) -> None:
    """Torch's own converter, then the safetensors library, as its documentation has it."""
    target.mkdir()
    dcp_to_torch_save(source, target / "all.pt")
    model = torch.load(target / "all.pt", weights_only=True, mmap=True)["model"]
    save_file(model, target / "model.safetensors", metadata={"format": "pt"})
    (target / "all.pt").unlink()
    sync(target)


def consolidation(source: Path, target: Path) -> None:
    """Torch's writer of Hugging Face files, with its consolidation."""
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, FileSystemReader(source), planner=planner, no_dist=True)
    writer = HuggingFaceStorageWriter(str(target), save_distributed=True, enable_consolidation=True)
    save(state["model"], storage_writer=writer, no_dist=True)
    sync(target)


def copy(source: Path, target: Path) -> None:
    """Copy the files through memory: what the disk lets one have."""
    target.mkdir()
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as one, open(target / file.name, "wb", buffering=0) as other:
            while data := one.read(16 << 20):
                other.write(data)
    sync(target)


def sync(target: Path) -> None:
    """Wait until the disk has all files of a directory."""
    for file in target.rglob("*"):
        if file.is_file():
            number = os.open(file, os.O_RDONLY)
            os.fsync(number)
            os.close(number)


WAYS: Mapping[str, Callable[[Path, Path], None]] = {
    "ours": ours,
    "format_utils": format_utils,
    "consolidation": consolidation,
    "copy": copy,
}


def main(way: str, source: Path, target: Path) -> None:
    """Go one way, and tell what it took."""
    before = high_water_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    WAYS[way](source, target)
    told = {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "grown_bytes": high_water_bytes() - before,
    }
    shutil.rmtree(target)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "make":
        make(Path(sys.argv[3]), int(sys.argv[2]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
