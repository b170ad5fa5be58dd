"""Everything a run is, as one frozen model: the schema of TOML files and the form of the Prefect UI."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _read_none(value: Any) -> Any:
    return None if value == "none" else value


def _refuse_secrets(url: str) -> str:
    """Refuse a URL that carries credentials, without repeating them: a specification is stored and shown."""
    parts = urlsplit(url)
    if parts.scheme and ("@" in parts.netloc or _SECRET.search(parts.query)):
        raise ValueError(
            "this URL carries credentials; leave them out and give them in the environment (AWS_*, or the "
            "store's own variables)"
        )
    return url


_SECRET = re.compile(r"(?i)(^|&)[^=&]*(key|secret|token|sig|signature|password|credential)=")
Location = Annotated[str, AfterValidator(_refuse_secrets)]
# TOML has no null: a value that may be absent, but is present by default, can be given as "none".
OptionalFloat = Annotated[float | None, BeforeValidator(_read_none)]


class _Section(BaseModel):
    """A frozen part of the specification; unknown keys are errors."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class JobSpec(_Section):
    """What is trained."""

    path: str = Field(
        default="elastic.training.gpt:GPTJob",
        description="The job's import path, my_package.my_module:MyJob.",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
    )
    settings: dict[str, Any] = Field(
        default={}, description="The job's own settings, by name; what is left out has the job's default."
    )
    code_dir: str = Field(
        default=".",
        description="The directory that holds the job's code.",
        min_length=1,
    )


class DataSpec(_Section):
    """What it is trained on."""

    source: Location = Field(
        default="stdlib",
        description="A file, directory, glob or fsspec URL of text; stdlib is Python's standard library.",
        min_length=1,
    )


class TrainingSpec(_Section):
    """How far, and how."""

    steps: int = Field(default=80, ge=1, description="Optimizer steps.")
    global_batch: int = Field(default=16, ge=1, le=1_000_000, description="Samples a step, over all workers.")
    virtual_ranks: int = Field(
        default=8,
        ge=1,
        le=65_536,
        description="Equal shares of the global batch, fixed for the run's life; workers share them out.",
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Of weights, data order and dropout.")
    determinism: Literal["bitwise", "fast"] = Field(
        default="bitwise",
        description="bitwise: the weights depend neither on the number of workers nor on failures. "
        "fast: gradients are summed in any order.",
    )
    grad_clip: OptionalFloat = Field(
        default=1.0,
        gt=0,
        description="Largest gradient norm; none (in the form: empty) leaves gradients unclipped.",
    )
    optimizer_copies: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Shard the optimizer (ZeRO, stage 1): its state of each parameter is on so many workers, "
        "so that one less may be lost at once without loss of a step; 0: every worker holds all of it.",
    )
    parameter_copies: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Shard parameters, gradients and optimizer (FSDP2): each shard is on so many workers "
        "(2 or more: replicas x shards, HSDP), so that one less may be lost at once without loss of a step; "
        "0: every worker holds all.",
    )
    when_not_finite: Literal["fail", "skip"] = Field(
        default="fail",
        description="A step with an infinite or undefined loss or gradient is never applied. "
        "fail: the run ends there; skip: it goes on.",
    )
    bucket_mib: float = Field(
        default=4.0,
        ge=0,
        allow_inf_nan=False,
        description="Gradients are reduced in pieces of so many MiB while backward still computes others; "
        "0: in one piece after it. With determinism = bitwise the weights do not depend on it.",
    )


class WorldSpec(_Section):
    """Who trains."""

    address: str | None = Field(
        default=None,
        description="Address of a Ray cluster; empty: a local one, started and ended with the run.",
    )
    workers: int = Field(default=4, ge=1, le=65_536, description="Workers at full strength.")
    min_workers: int = Field(
        default=1, ge=1, le=65_536, description="Train on as long as this many are left."
    )
    standbys: Annotated[int, Field(ge=0, le=65_536)] | Literal["auto"] = Field(
        default=0,
        union_mode="left_to_right",
        description="Workers kept ready beside them, to take a lost one's place at once; auto: as many as "
        "suffice on 99 days of 100, if a worker is lost every 250 days.",
    )
    gpus_per_worker: float = Field(default=0.0, ge=0, le=64, description="Accelerators a worker gets.")
    threads_per_worker: int = Field(
        default=1, ge=1, le=1024, description="Compute threads of a worker's CPU kernels."
    )
    gather_s: float = Field(
        default=120.0, gt=0, description="How long the first world waits for all workers, in seconds."
    )
    wait_s: float = Field(
        default=300.0,
        gt=0,
        description="How long to wait for replacements when fewer than min_workers are left, in seconds.",
    )


class TierSpec(_Section):
    """A store beyond the nearest, which the keepers bring checkpoints to."""

    url: Location = Field(description="URL of the store; {run} becomes the run's name.", min_length=1)
    every_steps: int = Field(
        default=1, ge=1, description="Bring those checkpoints there that are at multiples of so many steps."
    )
    keep_latest: int = Field(default=3, ge=1, description="Keep the newest so many checkpoints there.")
    name: str = Field(default="", description="What reports call it; empty: its URL.", pattern=r"^[\w.-]*$")


class CheckpointSpec(_Section):
    """Where the state is kept, how often, and for how long."""

    store: Location | None = Field(
        default=None,
        description="URL of the store, such as s3://bucket/{run}; {run} becomes the run's name. "
        "Empty: the run's own directory.",
    )
    every_steps: int = Field(
        default=20, ge=1, description="Take a checkpoint every so many steps, and at the end."
    )
    keep_latest: int = Field(default=3, ge=1, description="Keep the newest so many checkpoints.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Also keep those at multiples of so many steps."
    )
    codec: Literal["raw", "zstd", "planes"] = Field(
        default="planes",
        description="How chunks are stored: as they are, compressed, or only those bytes that shrink.",
    )
    level: int = Field(default=1, ge=1, le=19, description="Of zstd: 1 is fast, 19 is small.")
    arena_mib: int = Field(
        default=512,
        ge=16,
        le=1_048_576,
        description="Memory a host preallocates for captured snapshots, in MiB.",
    )
    when_full: Literal["wait", "skip"] = Field(
        default="wait",
        description="If that memory is full: wait until there is room, or skip the checkpoint.",
    )
    hold: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Hosts hold so many of the newest snapshots in memory, to restore from; 0: none.",
    )
    parity_losses: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Parity protects what hosts hold for the loss of so many of a group; 0: not at all.",
    )
    parity_group: int = Field(
        default=4, ge=2, le=32, description="Hosts of a parity group, about; more of them take less memory."
    )
    tiers: list[TierSpec] = Field(default=[], description="Further stores, each with its cadence.")
    delta_chain: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Store a changed chunk as its difference from the checkpoint before, up to so many times "
        "in a row; 0: always in full.",
    )


class RecoverySpec(_Section):
    """How much may break."""

    max_failures: int = Field(default=100, ge=0, description="Lost workers that the run survives.")
    lease_s: float = Field(
        default=60.0,
        ge=5,
        le=3600,
        description="How long workers live on without their driver before they save and end.",
    )
    compare_every: int = Field(
        default=100,
        ge=0,
        description="Compare the workers' copies of the state every so many steps, and before each "
        "checkpoint, and heal a corrupt one; 0: never.",
    )
    max_restarts: int = Field(
        default=3, ge=0, le=100, description="Automatic resumes after the flow run itself crashed."
    )


class FaultSpec(_Section):
    """Something broken on purpose."""

    at_step: int = Field(ge=1, description="Break it once so many steps are committed.")
    kind: Literal["kill_worker"] = Field(
        default="kill_worker", description="kill_worker: SIGKILL to a worker's process."
    )
    rank: int = Field(default=0, ge=0, description="Whose, by rank in the world of that moment.")


class DrillSpec(_Section):
    """What to break on purpose; nothing by default."""

    faults: list[FaultSpec] = Field(default=[], description="Faults, each at its step.")


class PipelineSpec(_Section):
    """What happens around the training."""

    runs_dir: str = Field(default="runs", min_length=1, description="Where each run has its directory.")
    evaluate_batches: int = Field(
        default=8, ge=1, le=100_000, description="Validation batches of an evaluation."
    )
    publish: bool = Field(default=True, description="Write the weights as safetensors, with a model card.")


class RunSpec(_Section):
    """Everything a run is. Two runs with equal job, data and training sections end with the same weights."""

    job: JobSpec = Field(default=JobSpec(), title="Job", description="What is trained.")
    data: DataSpec = Field(default=DataSpec(), title="Data", description="What it is trained on.")
    training: TrainingSpec = Field(default=TrainingSpec(), title="Training", description="How far, and how.")
    world: WorldSpec = Field(default=WorldSpec(), title="World", description="Who trains.")
    checkpoint: CheckpointSpec = Field(
        default=CheckpointSpec(),
        title="Checkpoint",
        description="Where the state is kept, how often, how long.",
    )
    recovery: RecoverySpec = Field(
        default=RecoverySpec(), title="Recovery", description="How much may break."
    )
    drill: DrillSpec = Field(default=DrillSpec(), title="Drill", description="What to break on purpose.")
    pipeline: PipelineSpec = Field(
        default=PipelineSpec(), title="Pipeline", description="What happens around the training."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for mistake in _disagreements(self):
            raise ValueError(mistake)
        return self


def with_drill(spec: RunSpec) -> RunSpec:
    """Return the specification with a fault: its own, or else the last worker's death a third of the way."""
    if spec.drill.faults or spec.training.steps < 2:
        return spec
    fault = FaultSpec(at_step=max(1, spec.training.steps // 3), rank=spec.world.workers - 1)
    return spec.model_copy(update={"drill": DrillSpec(faults=[fault])})


def _disagreements(spec: RunSpec) -> list[str]:
    """List what single fields cannot see, each with its remedy."""
    training, world = spec.training, spec.world
    mistakes = []
    if training.virtual_ranks > training.global_batch:
        mistakes.append(
            f"training.virtual_ranks = {training.virtual_ranks} is more than "
            f"training.global_batch = {training.global_batch} allows: "
            "each virtual rank needs a sample; lower it or raise the batch"
        )
    elif training.global_batch % training.virtual_ranks:
        mistakes.append(
            f"training.global_batch = {training.global_batch} cannot be shared equally by "
            f"training.virtual_ranks = {training.virtual_ranks}; make it a multiple"
        )
    if world.workers > training.virtual_ranks:
        mistakes.append(
            f"world.workers = {world.workers} is more than "
            f"training.virtual_ranks = {training.virtual_ranks}: "
            "a worker without a virtual rank has no work; lower it or raise the virtual ranks"
        )
    if world.min_workers > world.workers:
        mistakes.append(
            f"world.min_workers = {world.min_workers} is more than world.workers = {world.workers}; lower it"
        )
    if training.optimizer_copies and training.parameter_copies:
        mistakes.append(
            f"training.parameter_copies = {training.parameter_copies} shards the optimizer as well; "
            "set training.optimizer_copies = 0"
        )
    if training.parameter_copies and training.determinism == "fast":
        mistakes.append(
            f"training.parameter_copies = {training.parameter_copies} sums gradients in one order only; set "
            'training.determinism = "bitwise"'
        )
    if training.parameter_copies > world.workers:
        mistakes.append(
            f"training.parameter_copies = {training.parameter_copies} is more than "
            f"world.workers = {world.workers} can hold: each holds one; lower it or raise the workers"
        )
    mistakes += _memory_mistakes(spec.checkpoint)
    for index, fault in enumerate(spec.drill.faults):
        if fault.at_step >= training.steps:
            mistakes.append(
                f"drill.faults[{index}].at_step = {fault.at_step} is never reached before the end: "
                f"training.steps = {training.steps}; break something earlier"
            )
        if fault.rank >= world.workers:
            mistakes.append(
                f"drill.faults[{index}].rank = {fault.rank} does not exist: world.workers = {world.workers} "
                f"have the ranks 0 to {world.workers - 1}"
            )
    return mistakes


def _memory_mistakes(checkpoint: CheckpointSpec) -> list[str]:
    """List what does not go together in how hosts hold and protect snapshots."""
    mistakes = []
    if checkpoint.parity_losses and not checkpoint.hold:
        mistakes.append(
            f"checkpoint.parity_losses = {checkpoint.parity_losses} protects nothing: hosts hold no snapshot "
            "in memory; set checkpoint.hold to 1 or more"
        )
    if checkpoint.parity_losses >= checkpoint.parity_group:
        mistakes.append(
            f"checkpoint.parity_losses = {checkpoint.parity_losses} cannot be made up for by a group of "
            f"checkpoint.parity_group = {checkpoint.parity_group} hosts: it needs at least one more"
        )
    labels = [tier.name or tier.url for tier in checkpoint.tiers]
    if len(set(labels)) != len(labels):
        mistakes.append("checkpoint.tiers names one tier twice: give each a URL and a name of its own")
    return mistakes
