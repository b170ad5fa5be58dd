"""What a run computes, as plain values."""

from dataclasses import dataclass
from typing import Literal

from elastic.training.buckets import BUCKET_MIB


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run computes: a function of these values and the data, whoever computes it.

    `micro_batch` samples are a virtual rank's share of a step; `grad_clip` is the largest gradient norm
    (None: any); a checkpoint is taken every `save_every` steps and at the end. `source` names the data. Every
    `compare_every` steps (0: never) the replicas are compared. Each parameter's optimizer state is on
    `optimizer_copies` ranks, everything else of it as well if `parameter_copies` is given (0: on all). A step
    whose loss or gradient is not finite fails the run or is skipped; either way nothing of it is applied.
    Gradients are reduced in buckets of `bucket_mib` while backward still runs (0: in one piece after it). The
    last checkpoint may take `save_s` to become durable.
    """

    num_steps: int
    virtual_ranks: int
    micro_batch: int
    seed: int
    determinism: Literal["bitwise", "fast"]
    grad_clip: float | None
    save_every: int
    source: str
    run: str
    spec_digest: str
    compare_every: int = 0
    optimizer_copies: int = 0
    parameter_copies: int = 0
    when_not_finite: Literal["fail", "skip"] = "fail"
    bucket_mib: float = BUCKET_MIB
    save_s: float = 600.0

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a share of the state, which moves with every change of the world."""
        return bool(self.optimizer_copies or self.parameter_copies)

    def is_saved(self, step: int) -> bool:
        """Whether the state after so many committed steps is saved."""
        return step > 0 and (step % self.save_every == 0 or step >= self.num_steps)

    def is_compared(self, step: int) -> bool:
        """Whether the replicas are compared after so many steps: at times, and before they are saved."""
        return self.compare_every > 0 and (step % self.compare_every == 0 or self.is_saved(step))
