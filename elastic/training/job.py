"""What a user implements: a job. It sees batches and virtual ranks, never ranks, worlds or checkpoints."""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.errors import JobRejected

_METHODS = ("model", "optimizer", "dataset", "batch", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which part of the data a dataset is for, and how large its micro-batches are (in samples)."""

    name: Literal["train", "validation"]
    source: str
    seed: int
    micro_batch: int
    settings: Any


class Job(Protocol):
    """A training job, named by the import path of its class, which is made without arguments.

    `settings` is the type of its settings, a pydantic model or a dataclass. Everything has to be a function
    of its arguments; randomness comes from `rng` or from torch's default generators, which are seeded per
    (seed, step, virtual rank). All micro-batches have one shape; parameters are float32 (for mixed
    precision, use autocast in `loss`).

    A job may also have: `schedule(optimizer, num_steps)` returning a learning-rate schedule that is stepped
    once a step; `tokens(batch)`, the number of tokens in a batch (else its samples are counted);
    `baseline(dataset)`, the loss of a predictor that learned nothing; `describe(settings)`, what a
    published model's config.json should say.
    """

    settings: Any

    def model(self, settings: Any) -> nn.Module:
        """Make the model, on the CPU."""

    def optimizer(self, model: Any) -> Optimizer:
        """Make the optimizer of the model's parameters."""

    def dataset(self, split: Split) -> Any:
        """Open the data: tables, not contents."""

    def batch(self, dataset: Any, step: int, virtual_rank: int) -> Any:
        """Read the micro-batch of one virtual rank in one step."""

    def loss(self, model: Any, batch: Any, rng: torch.Generator) -> Tensor:
        """Compute the mean loss over the micro-batch, which may still have to move to the model's device."""


def load_job(path: str) -> Job:
    """Import and make the job that `path` ("package.module:Class") names.

    Raises JobRejected if it cannot be imported, made, or lacks something that a job has.
    """
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise JobRejected(f"job.path = {path!r} names no job: write it as package.module:Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
        job = found() if callable(found) else None
    except Exception as error:
        raise JobRejected(f"job.path = {path!r} does not import: {type(error).__name__}: {error}") from error
    if job is None:
        raise JobRejected(f"job.path = {path!r}: module {module_name} has no class {class_name}")
    for name in _METHODS:
        if not callable(getattr(job, name, None)):
            raise JobRejected(f"job.path = {path!r}: {class_name} lacks the method {name}(); see elastic.Job")
    if not isinstance(getattr(job, "settings", None), type):
        raise JobRejected(
            f"job.path = {path!r}: {class_name} lacks `settings`, the type of its settings; see elastic.Job"
        )
    return cast(Job, job)


def load_settings(job: Job, given: Mapping[str, Any]) -> Any:
    """Make the job's typed settings of plain data. Raises JobRejected naming each field that is wrong."""
    if unknown := sorted(set(given) - _fields(job.settings)):
        known = ", ".join(sorted(_fields(job.settings))) or "none"
        raise JobRejected(f"job.settings.{unknown[0]} is no setting of {type(job).__name__}; it has: {known}")
    try:
        return TypeAdapter(job.settings).validate_python(dict(given))
    except ValidationError as error:
        wrong = "; ".join(
            f"job.settings.{'.'.join(map(str, each['loc']))}: {each['msg']} (given: {each['input']!r})"
            for each in error.errors()
        )
        raise JobRejected(f"the settings do not fit {type(job).__name__}: {wrong}") from error


def _fields(settings: type) -> set[str]:
    if issubclass(settings, BaseModel):
        return set(settings.model_fields)
    if dataclasses.is_dataclass(settings):
        return {field.name for field in dataclasses.fields(settings)}
    raise JobRejected(
        f"{settings.__name__} cannot hold a job's settings: make it a pydantic model or a dataclass"
    )
