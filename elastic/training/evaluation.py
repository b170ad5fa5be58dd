"""A trained model without its training: build it, load it, score it on the validation text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from checkpoint import Mismatch
from elastic.training.job import Job, Split, load_job, load_settings
from elastic.training.randomness import INITIAL, keyed, seed_for
from elastic.training.state import load_model

EVALUATION_BATCH = 16
"""Samples in a validation batch."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean validation `loss` over `num_tokens`, and what the job's trivial predictor reaches (None: it has
    none).

    For text, `unigram` is the entropy of single bytes in nats, computed on the same split.
    """

    loss: float
    unigram: float | None
    num_tokens: int


def build_model(job_path: str, settings: Mapping[str, Any]) -> nn.Module:
    """Make a job's model, untrained, in evaluation mode. Raises JobRejected."""
    job = load_job(job_path)
    return _build(job, load_settings(job, settings))


def model_from_state(job_path: str, settings: Mapping[str, Any], state: Mapping[str, Any]) -> nn.Module:
    """Make a job's model with the weights of a training's state.

    Raises JobRejected, or `Mismatch` for another model's state.
    """
    model = build_model(job_path, settings)
    _load(model, state)
    return model


def evaluate(
    job_path: str,
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    source: str,
    seed: int,
    num_batches: int,
) -> Evaluation:
    """Score a state on `num_batches` batches of the validation split, on the CPU; equal states give equal
    bits.

    Only `state["model"]` is read. Raises JobRejected, or `Mismatch` for another model's state.
    """
    job = load_job(job_path)
    typed = load_settings(job, settings)
    model = _build(job, typed)
    _load(model, state)
    dataset = job.dataset(
        Split(name="validation", source=source, seed=seed, micro_batch=EVALUATION_BATCH, settings=typed)
    )
    total, num_tokens = 0.0, 0
    count = getattr(job, "tokens", None)
    for index in range(num_batches):
        batch = job.batch(dataset, index, 0)
        with torch.no_grad(), keyed(seed_for(seed, index, 0), torch.device("cpu")) as rng:
            total += float(job.loss(model, batch, rng))
        num_tokens += count(batch) if count is not None else EVALUATION_BATCH
    baseline = getattr(job, "baseline", None)
    return Evaluation(
        total / num_batches, float(baseline(dataset)) if baseline is not None else None, num_tokens
    )


def _build(job: Job, settings: Any) -> nn.Module:
    with keyed(seed_for(0, INITIAL, INITIAL), torch.device("cpu")):
        return job.model(settings).eval()


def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    if "model" not in state:
        raise Mismatch("the state has no 'model': it is not a training's")
    load_model(model, state["model"])
