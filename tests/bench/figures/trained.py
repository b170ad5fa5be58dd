"""The default job's real state: trained once as its users would, and kept under the temporary directory."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from elastic.training.gpt import GPT, GPTJob, GPTSettings
from elastic.training.job import Split
from elastic.training.randomness import keyed, seed_for
from elastic.training.state import Learner, first_model
from tests.bench.figures.session import console

_SEED, _VIRTUAL_RANKS, _MICRO_BATCH, _GRAD_CLIP = 0, 8, 2, 1.0  # the defaults of a run's specification

Tensors = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Trained:
    """A state after `step` steps of a schedule over `num_steps`, and the weights one step before it.

    `learning_rate` is that of the blocks' matrices in the last step (the tables' is six times as much).
    """

    step: int
    num_steps: int
    learning_rate: float
    weights: Tensors
    moments: Tensors
    weights_before: Tensors

    def __str__(self) -> str:
        return f"default job, step {self.step} of {self.num_steps}, lr {self.learning_rate:.2g}"


def trained(num_steps: int, steps: tuple[int, ...]) -> list[Trained]:
    """Train the default job as one rank, or find that it was done; return its state at these steps."""
    told = f"{GPTSettings().model_dump_json()} {num_steps} {steps} {torch.__version__}"
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"holdfast-bench-{os.getuid()}" / f"trained-{digest}.pt"
    if not path.exists():
        console.print(f"training the default job for {max(steps)} steps, once; then kept as {path}")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save([vars_of(each) for each in _train(num_steps, steps)], partial)
        partial.replace(path)
    return [Trained(**fields) for fields in torch.load(path, weights_only=True)]


def vars_of(state: Trained) -> dict[str, int | float | Tensors]:
    """Return the fields, as they are written."""
    return {name: getattr(state, name) for name in Trained.__slots__}


def _train(num_steps: int, steps: tuple[int, ...]) -> Iterator[Trained]:
    cpu, job, settings = torch.device("cpu"), GPTJob(), GPTSettings()
    learner = Learner(job, first_model(job, settings, _SEED), _SEED, num_steps)
    split = Split(name="train", source="stdlib", seed=_SEED, micro_batch=_MICRO_BATCH, settings=settings)
    dataset = job.dataset(split)
    model = cast(GPT, learner.model)
    parameters = list(model.parameters())
    for step in range(max(steps)):
        with keyed(seed_for(_SEED, step, 0), cpu) as rng:
            batch = torch.cat([job.batch(dataset, step, each) for each in range(_VIRTUAL_RANKS)])
            job.loss(model, batch, rng).backward()
        torch.nn.utils.clip_grad_norm_(parameters, _GRAD_CLIP)
        before = _copied(parameters) if step + 1 in steps else []
        groups = learner.tree(step)["optimizer"]["groups"]
        learner.update()
        model.zero_grad()
        if step + 1 in steps:
            kept = learner.tree(step + 1)["optimizer"]["state"].values()
            moments = [each[name] for each in kept for name in ("exp_avg", "exp_avg_sq")]
            rate = float(groups[1]["lr"])
            yield Trained(step + 1, num_steps, rate, _copied(parameters), _copied(moments), before)


def _copied(tensors: Iterable[torch.Tensor]) -> Tensors:
    return [tensor.detach().clone() for tensor in tensors]
