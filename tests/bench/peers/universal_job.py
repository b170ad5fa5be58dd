"""One way from a ZeRO checkpoint to DeepSpeed's universal folders, in a process of its own, timed.

    python -m tests.bench.peers.universal_job WAY SOURCE TARGET     tells {"seconds", ...} on its last line

`make` (TARGET: how many layers) and `theirs` need DeepSpeed's environment, `ours`, `proved`, `copy` ours.
Every way ends with its files on the disk (fsync). Memory is the most of any one process.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

Way = Callable[[Path, Path], None]

BUDGET_BYTES = 256 << 20
TAG = "global_step1"
_HIDDEN = 1024
_WORLD = 2


def make(source: Path, num_layers: int) -> None:
    """Train a step with ZeRO-2 over two ranks, and save; 14 bytes a parameter."""
    from torch.multiprocessing.spawn import spawn

    spawn(_train, (source, num_layers), _WORLD)


def _train(rank: int, source: Path, num_layers: int) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_WORLD), **where}
    import deepspeed  # type: ignore[import-not-found]  # it has an environment of its own
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(_HIDDEN, 4 * _HIDDEN, bias=False) for _ in range(num_layers)]
    model = torch.nn.Sequential(*(torch.nn.Sequential(one, torch.nn.AvgPool1d(4)) for one in layers))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), config=config
    )
    engine.backward(engine(torch.randn(2, _HIDDEN, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    engine.save_checkpoint(str(source), tag=TAG)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ours() -> Way:
    """Convert, unproved as theirs is."""
    from checkpoint.interop.drafting import drafting
    from checkpoint.interop.formats import deepspeed_writing  # noqa: F401 -- it imports torch
    from checkpoint.interop.formats.known import open_foreign, write_foreign

    def convert(source: Path, target: Path) -> None:
        with drafting(str(target), "bench") as draft:
            write_foreign("deepspeed-universal", draft, open_foreign(str(source)), BUDGET_BYTES)

    return convert


def proved() -> Way:
    """Convert as `holdfast export` does."""
    from checkpoint import ConversionSettings, Emigration, Whereabouts, export_foreign
    from checkpoint.interop.formats import deepspeed_writing  # noqa: F401 -- as above

    def convert(source: Path, target: Path) -> None:
        place, settings = Whereabouts(str(source)), ConversionSettings(BUDGET_BYTES)
        export_foreign(place, str(target), Emigration("deepspeed-universal"), settings=settings)

    return convert


def theirs() -> Way:
    """DeepSpeed's own converter, with as many processes as it takes by itself; its `tmp` is left."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.checkpoint.ds_to_universal import main  # type: ignore[import-not-found]  # as above

    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        folders = {"input_folder": str(source / TAG), "output_folder": str(target / f"{TAG}_universal")}
        workers = {"num_extract_workers": 4, "num_merge_workers": 2}
        how = {"keep_temp_folder": True, "strict": True, "inject_missing_state": True}
        main(argparse.Namespace(**folders, **workers, **how))
        sync(target)

    return convert


def copy() -> Way:
    """Copy the files through memory: what the disk lets one have."""

    def convert(source: Path, target: Path) -> None:
        for file in sorted(one for one in source.rglob("*") if one.is_file()):
            other = target / file.relative_to(source)
            other.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "rb", buffering=0) as one, open(other, "wb", buffering=0) as two:
                while data := one.read(16 << 20):
                    two.write(data)
        sync(target)

    return convert


def sync(target: Path) -> None:
    """Wait until the disk has all files that stay."""
    for file in target.rglob("*"):
        if file.is_file() and "tmp" not in file.relative_to(target).parts:
            number = os.open(file, os.O_RDONLY)
            os.fsync(number)
            os.close(number)


WAYS: Mapping[str, Callable[[], Way]] = {"ours": ours, "proved": proved, "theirs": theirs, "copy": copy}


def main(way: str, source: Path, target: Path) -> None:
    """Go one way, and tell what it took."""
    convert = WAYS[way]()  # what has to be imported is not timed, for any of them
    before, started = _used(), time.perf_counter()
    convert(source, target)
    seconds, after = time.perf_counter() - started, _used()
    sizes = {file: file.stat().st_size for file in target.rglob("*") if file.is_file()}
    told = {
        "seconds": seconds,
        "cpu_s": after[0] - before[0],
        "peak_bytes": after[1],
        "grown_bytes": after[1] - before[1],
        "temporary_bytes": sum(
            size for file, size in sizes.items() if "tmp" in file.relative_to(target).parts
        ),
        "num_bytes": sum(file.stat().st_size for file in source.rglob("*") if file.is_file()),
    }
    shutil.rmtree(target)
    sys.stdout.write("\n" + json.dumps(told) + "\n")


def _used() -> tuple[float, int]:
    """Return the processor's time of this process and its children, and the most memory that one had."""
    both = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in both)
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return cpu_s, max(own, both[1].ru_maxrss) << 10


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
