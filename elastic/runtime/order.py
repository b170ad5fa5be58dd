"""What the driver is asked to do: one frozen order, made at the door from the run's specification."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from checkpoint import Parity, SavePolicy, Tier
from elastic.control.policy import WorldPolicy


class FaultKind(StrEnum):
    """What a drill breaks: one worker's process."""

    KILL_WORKER = "kill_worker"


@dataclass(frozen=True, slots=True)
class Fault:
    """Break something once `at_step` steps are committed; `rank` is that of the world at that moment."""

    at_step: int
    kind: FaultKind = FaultKind.KILL_WORKER
    rank: int = 0


@dataclass(frozen=True, slots=True)
class ClusterOrder:
    """Where workers run: a Ray cluster's `address`, or None for a local one started for the run."""

    address: str | None = None
    gpus_per_worker: float = 0.0
    threads_per_worker: int = 1


@dataclass(frozen=True, slots=True)
class CheckpointOrder:
    """Where checkpoints go, how often, and which are kept: the newest `keep_latest` and every `keep_every`
    steps.

    A host holds the newest `hold` snapshots in memory, protected as `parity` says; `tiers` are further
    stores, which the keepers bring checkpoints to.
    """

    store_url: str
    every_steps: int
    keep_latest: int
    keep_every: int | None
    save: SavePolicy
    arena_bytes: int
    hold: int = 0
    parity: Parity | None = None
    tiers: tuple[Tier, ...] = ()


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What is trained: the job's import path, its settings as plain data, and where its code and its text
    lie.
    """

    path: str
    settings: Mapping[str, Any]
    source: str
    code_dir: Path


@dataclass(frozen=True, slots=True)
class TrainingOrder:
    """How far and how: `global_batch` samples a step, dealt as `virtual_ranks` equal micro-batches."""

    num_steps: int
    global_batch: int
    virtual_ranks: int
    seed: int
    determinism: Literal["bitwise", "fast"]
    grad_clip: float | None
    compare_every: int = 0
    optimizer_copies: int = 0
    parameter_copies: int = 0
    when_not_finite: Literal["fail", "skip"] = "fail"
    bucket_mib: float = 4.0


@dataclass(frozen=True, slots=True)
class TrainOrder:
    """A whole run.

    `spec_digest` names the specification it came from; `lease_s` bounds life without a driver.
    """

    run: str
    run_dir: Path
    spec_digest: str
    job: JobOrder
    training: TrainingOrder
    world: WorldPolicy
    cluster: ClusterOrder
    checkpoint: CheckpointOrder
    drill: tuple[Fault, ...] = ()
    lease_s: float = 60.0
