"""What grows: bytes stored over many checkpoints, memory over the budget, time with the number of tensors."""

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from checkpoint import Durable, LocalHost, SavePolicy, Saver, Share, Store, load, open_store
from checkpoint.engine.reading import ReadPolicy
from tests.bench.figures.session import (
    GIB,
    OURS,
    OURS_CODEC,
    PEERS,
    Lane,
    Session,
    arena_bytes,
    rounds,
    session,
)
from tests.bench.harness import Effort, Goal, Row, row

_MIB = 1 << 20
_STAT_BLOCK = 512  # bytes (stat(2))
_NUM_TENSORS = 40
_NUM_FROZEN = 38  # 95%
_NUM_CHECKPOINTS = 10
_SETTLE_S = 120.0
_SAMPLE_S = 0.02
_NUM_SMALL, _SMALL_BYTES = 2000, 1024
_MEMORY_STEPS = 4
_RESTORE_BYTES = ReadPolicy().budget_bytes


def dedup(effort: Effort) -> list[Row]:
    """Measure what ten checkpoints of a model take whose parameters are frozen but for 5%."""
    num_bytes = (16 if effort is Effort.QUICK else 128) * _MIB
    torch.manual_seed(0)
    state = {f"layers.{i}": torch.randn(num_bytes // 4 // _NUM_TENSORS) for i in range(_NUM_TENSORS)}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
        store = open_store(directory)
        stored = []
        with LocalHost(store, arena_bytes=2 * num_bytes) as host:
            saver = Saver(host, "bench", SavePolicy())
            for step in range(1, _NUM_CHECKPOINTS + 1):
                for number in range(_NUM_FROZEN, _NUM_TENSORS):
                    state[f"layers.{number}"].mul_(1.001)
                saver.save(step, state, Share.alone(), {})
                if not saver.drain(_SETTLE_S) or not isinstance(saver.outcomes()[-1], Durable):
                    raise RuntimeError(f"the checkpoint of step {step} was lost")
                stored.append(_bytes_in(store))
            saver.close()
        newest = load(store).state
    if any(not torch.equal(newest[name], tensor) for name, tensor in state.items()):
        raise RuntimeError("the newest of the checkpoints that share chunks is not the state at its save")
    return [
        row(
            "dedup: 10 checkpoints of a model with 95% frozen parameters, in bytes of one",
            "x",
            ours=stored[-1] / stored[0],
            peers={"without dedup": float(_NUM_CHECKPOINTS)},
            goal=Goal("<=", 1.6),
        )
    ]


def memory(effort: Effort) -> list[Row]:
    """Measure the peak of memory that checkpoints add to a training that saves every step."""
    num_bytes = GIB // 4 if effort is Effort.QUICK else GIB // 2
    budget = arena_bytes(num_bytes)
    with session() as workers:
        engines = (OURS, OURS_CODEC, *(PEERS if workers.peers is not None else ()))
        peaks = {engine: _peaks(workers, engine, num_bytes) for engine in engines}
    extra = {engine: each.saving_bytes for engine, each in peaks.items()}
    peers = {engine: extra[engine] / _MIB for engine in PEERS if engine in extra}
    size = f"{num_bytes / GIB:g} GiB"
    return [
        row(f"peak extra memory, saving {size} every step", "MiB", ours=extra[OURS] / _MIB, peers=peers),
        *(
            row(
                f"peak extra memory over the budget of {budget / _MIB:.0f} MiB, trainer and keeper, {what}",
                "%",
                ours=100 * (extra[engine] / budget - 1),
                goal=Goal("<=", 5.0),
            )
            for engine, what in ((OURS, "raw codec"), (OURS_CODEC, "default codec"))
        ),
        row(
            f"peak extra memory of a restore of {size} over its budget of {_RESTORE_BYTES / _MIB:.0f} MiB",
            "%",
            ours=100 * (max(peaks[ours].restore_bytes for ours in (OURS, OURS_CODEC)) / _RESTORE_BYTES - 1),
            goal=Goal("<=", 5.0),
        ),
    ]


def small_tensors(effort: Effort) -> list[Row]:
    """Measure what a tensor costs by itself: 2,000 of 1 KiB against the same bytes in one."""
    with session() as workers:
        return _small_tensors(workers, 3 if effort is Effort.QUICK else 7)


def _small_tensors(workers: Session, num_rounds: int) -> list[Row]:
    blocked: dict[str, list[float]] = {}
    durable: dict[tuple[str, int], list[float]] = {}
    for num_tensors in (1, _NUM_SMALL):
        lanes = workers.lanes(_NUM_SMALL * _SMALL_BYTES, num_tensors, (OURS, *PEERS))

        def turn(lane: Lane, num_tensors: int = num_tensors) -> None:
            trained = lane.ask("train", num_steps=4, every=1, num_products=0)
            if num_tensors > 1:
                blocked.setdefault(lane.engine, []).extend(trained["blocked"])
            durable.setdefault((lane.engine, num_tensors), []).append(lane.ask("persist"))
            lane.ask("drop")

        for lane in lanes:
            lane.ask("train", num_steps=2, every=1, num_products=0)
        rounds(num_rounds, [partial(turn, lane) for lane in lanes])
        workers.close()
    per_tensor = {engine: 1e6 * median(each) / _NUM_SMALL for engine, each in blocked.items()}
    overhead = {
        engine: 1e6 * (median(durable[engine, _NUM_SMALL]) - median(durable[engine, 1])) / (_NUM_SMALL - 1)
        for engine in blocked
    }
    ours, ours_durable = per_tensor.pop(OURS), overhead.pop(OURS)
    name = "2,000 tensors of 1 KiB"
    return [
        row(
            f"{name}: save and capture, per tensor", "us", ours=ours, peers=per_tensor, goal=Goal("<=", 20.0)
        ),
        row(
            f"{name}: to durable, per tensor, beyond the same bytes in one",
            "us",
            ours=ours_durable,
            peers=overhead,
            goal=Goal("<=", 20.0),
        ),
    ]


def _bytes_in(store: Store) -> int:
    return sum(entry.num_bytes for entry in store.list(""))


@dataclass(frozen=True, slots=True)
class _Peaks:
    """By how much memory exceeds, at its peak, that of the trainer with its state."""

    saving_bytes: int
    restore_bytes: int


def _peaks(workers: Session, engine: str, num_bytes: int) -> _Peaks:
    """Measure an engine alone: all its processes while it saves, the trainer while it restores."""
    worker = workers.peers if engine in PEERS and workers.peers is not None else workers.ours
    worker.ask("make", num_bytes=num_bytes, num_tensors=32, device="cpu")
    before = _bytes_of(worker.ask("processes", engine=engine))
    budget = {} if engine in PEERS else {"arena_bytes": arena_bytes(num_bytes)}
    worker.ask("open", engine=engine, **budget)
    num_products = workers.products(num_bytes / GIB)
    processes = worker.ask("processes", engine=engine)

    def work() -> None:
        worker.ask("train", engine=engine, num_steps=_MEMORY_STEPS, every=1, num_products=num_products)

    peak = _peak_bytes(processes, work)
    restore_bytes = worker.ask("restore", engine=engine)["extra_bytes"]
    worker.ask("close")
    return _Peaks(peak - before, restore_bytes)


def _peak_bytes(processes: list[int], work: Callable[[], None]) -> int:
    """Return the largest sum of the processes' memory that was seen while the work was done."""
    thread = threading.Thread(target=work)
    thread.start()
    peak = 0
    while thread.is_alive():
        peak = max(peak, _bytes_of(processes))
        thread.join(_SAMPLE_S)
    return peak


def _bytes_of(processes: list[int]) -> int:
    """Return the memory of processes: what is theirs, their parts of files (PSS, proc(5)), and arenas once.

    Their parts of an arena do not add up: while one process is read, another maps what was counted as the
    first one's alone. The sum was up to a tenth more than all of the arena.
    """
    parts = [_parts_of(process) for process in processes]
    arenas = {}
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(descriptor).startswith("/memfd:"):
                    found = descriptor.stat()
                    arenas[found.st_ino] = found.st_blocks * _STAT_BLOCK
    shared = sum(arenas.values()) if arenas else sum(part["Pss_Shmem"] for part in parts)
    return shared + sum(part["Pss"] - part["Pss_Shmem"] for part in parts)


def _parts_of(process: int) -> dict[str, int]:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in lines)}
