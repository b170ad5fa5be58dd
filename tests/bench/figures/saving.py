"""Blocked time, durable throughput and restore, beside the peers and the controls, in interleaved rounds."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from tests.bench.figures.session import CONTROL, GIB, OURS, PEERS, Lane, Session, console, rounds, session
from tests.bench.harness import Effort, Goal, Row, row

ASYNC = ("dcp.async_save", "dcp.async_save, reused stager")  # those the goal names
STEP_S_PER_GIB = 1.0
PERSISTED = 3  # checkpoints in a round, of those that are compared closely
TORCH_SAVE, DCP_LOAD = "torch.save", "dcp.load"


@dataclass(frozen=True, slots=True)
class _Size:
    """A size of the state, and how much of it is measured."""

    num_bytes: int
    num_rounds: int
    num_steps: int

    @property
    def name(self) -> str:
        return f"{self.num_bytes / GIB:g} GiB"


@dataclass(slots=True)
class _Samples:
    """Everything measured of one engine, in seconds."""

    blocked: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)
    num_wrong: int = 0


def blocked(effort: Effort) -> list[Row]:
    """Measure saving every step, persisting one checkpoint, and restoring it; 0.5 GiB and (FULL) 2 GiB."""
    with session() as workers:
        if effort is Effort.QUICK:
            return _measure(workers, _Size(GIB // 2, num_rounds=1, num_steps=2))
        small = _measure(workers, _Size(GIB // 2, num_rounds=4, num_steps=3))
        return [*small, *_measure(workers, _Size(2 * GIB, num_rounds=2, num_steps=2))]


def _measure(workers: Session, size: _Size) -> list[Row]:
    lanes = workers.lanes(size.num_bytes, 32, (OURS, CONTROL, *PEERS))
    step_s = STEP_S_PER_GIB * size.num_bytes / GIB
    num_products = workers.products(step_s)
    samples: dict[str, _Samples] = defaultdict(_Samples)
    copies: list[float] = []

    def turn_of(lane: Lane, into: _Samples, num_steps: int, num_products: int) -> None:
        work = {"num_steps": num_steps, "every": 1, "num_products": num_products}
        trained = lane.ask("train", **work, warm_bytes=size.num_bytes)
        into.blocked += trained["blocked"]
        restored = lane.ask("restore")
        into.restored.append(restored["seconds"])
        into.num_wrong += not restored["is_equal"]
        lane.ask("drop")
        for _ in range(PERSISTED if lane.engine in (OURS, CONTROL) else 1):
            into.durable.append(lane.ask("persist"))
            lane.ask("drop")

    for lane in lanes:  # buffers that are kept, code that is loaded late, the disk's first blocks
        turn_of(lane, _Samples(), 1, 1)
    turns = [
        lambda lane=lane: turn_of(lane, samples[lane.engine], size.num_steps, num_products) for lane in lanes
    ]
    rounds(size.num_rounds, [*turns, lambda: copies.append(workers.ours.ask("memcpy"))])
    workers.close()
    if step_s < 3 * median(copies):
        console.print(f"the step of {step_s:.2f} s is less than three memcpys: the blocked time is not valid")
    return [
        row(f"{size.name}: control, memcpy of the state", "ms", ours=1e3 * median(copies)),
        row(f"{size.name}: control, the slowest memcpy", "ms", ours=1e3 * max(copies)),
        *_blocked_rows(size, samples),
        *_durable_rows(size, samples),
        *_restore_rows(size, samples),
        row(
            f"{size.name}: restored checkpoints that differ from the state at save",
            "",
            ours=samples[OURS].num_wrong,
            peers={peer: samples[peer].num_wrong for peer in PEERS if peer in samples},
            goal=Goal("<=", 0),
        ),
    ]


def _blocked_rows(size: _Size, samples: Mapping[str, _Samples]) -> list[Row]:
    figures = {engine: 1e3 * median(each.blocked) for engine, each in samples.items()}
    metric, ours = f"{size.name}: blocked per checkpoint, saving every step", figures[OURS]
    return [
        row(metric, "ms", ours=ours, peers=_of(figures, PEERS)),
        row(
            f"{metric}, against torch.save",
            "ms",
            ours=ours,
            peers=_of(figures, (TORCH_SAVE,)),
            goal=Goal("<=", 1 / 48, of="ratio"),
        ),
        row(
            f"{metric}, against async_save",
            "ms",
            ours=ours,
            peers=_of(figures, ASYNC),
            goal=Goal("<=", 1 / 5, of="ratio"),
        ),
    ]


def _durable_rows(size: _Size, samples: Mapping[str, _Samples]) -> list[Row]:
    figures = _gb_per_s(size, {engine: each.durable for engine, each in samples.items()})
    metric, ours = f"{size.name}: save to durable, raw codec", figures[OURS]
    return [
        row(metric, "GB/s", ours=ours, peers=_of(figures, PEERS), better="higher"),
        row(
            f"{metric}, against the control",
            "GB/s",
            ours=ours,
            peers=_of(figures, (CONTROL,)),
            better="higher",
            goal=Goal(">=", 0.9, of="ratio"),
        ),
    ]


def _restore_rows(size: _Size, samples: Mapping[str, _Samples]) -> list[Row]:
    seconds = {engine: each.restored for engine, each in samples.items()}
    by_dcp = [each for engine in seconds if engine.startswith("dcp.") for each in seconds[engine]]
    if by_dcp:  # one reader, whichever way its files were written
        seconds = {engine: each for engine, each in seconds.items() if not engine.startswith("dcp.")}
        seconds[DCP_LOAD] = by_dcp
    figures = _gb_per_s(size, seconds)
    metric, ours = f"{size.name}: restore from a warm page cache", figures[OURS]
    return [
        row(metric, "GB/s", ours=ours, peers=_of(figures, (*PEERS, DCP_LOAD)), better="higher"),
        row(
            f"{metric}, against dcp.load",
            "GB/s",
            ours=ours,
            peers=_of(figures, (DCP_LOAD,)),
            better="higher",
            goal=Goal(">=", 2.0, of="ratio"),
        ),
        row(
            f"{metric}, against the control (2 threads: read, checksum, fingerprint)",
            "GB/s",
            ours=ours,
            peers=_of(figures, (CONTROL,)),
            better="higher",
            goal=Goal(">=", 0.8, of="ratio"),
        ),
    ]


def _of(figures: Mapping[str, float], engines: tuple[str, ...]) -> dict[str, float]:
    return {engine: figures[engine] for engine in engines if engine in figures}


def _gb_per_s(size: _Size, seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {engine: size.num_bytes / 1e9 / median(each) for engine, each in seconds.items()}
