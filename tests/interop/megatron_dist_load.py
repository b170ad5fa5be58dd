"""Has Megatron-Core load a distributed checkpoint into ranks of its own, and compares what they then hold.

    python -m tests.interop.megatron_dist_load FOLDER --kind llama --tensor 1 --pipeline 2 --data 2

FOLDER holds what `megatron_dist_make` gives a model of this kind, whoever wrote it. It needs an environment
that has megatron-core.
"""

import argparse
import os
import warnings
from typing import Any

import torch
from megatron.core import (  # type: ignore[import-not-found]  # it has an environment of its own
    dist_checkpointing,
    parallel_state,
)

from tests.interop.megatron_dist_make import (
    STEP,
    Parts,
    begin,
    fill_parts,
    inner_of,
    launch,
    make_states,
    named_parameters,
    parser_of,
    sharded_of,
    wrap,
)
from tests.interop.megatron_make import VOCAB, models_of

_PADDED = ("word_embeddings.weight", "output_layer.weight")


def run(rank: int, options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    begin(rank, options)
    models = models_of(options)
    parts, _ = fill_parts(models)
    for parameter in named_parameters(models).values():
        parameter.data.zero_()
    wrapped, optimizer = wrap(models, options)
    make_states(optimizer)
    metadata = dist_checkpointing.load_content_metadata(options.out)
    sharded = sharded_of(models, metadata)
    wanted = {
        **sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=True, metadata=metadata),
    }
    state = dist_checkpointing.load(wanted, options.out)
    for key, model in zip(sharded, models, strict=True):
        model.load_state_dict(state[key])
    for one in inner_of(optimizer):
        keep_steps(one)
    optimizer.load_state_dict(state["optimizer"])
    compare(wrapped, optimizer, parts)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def keep_steps(optimizer: Any) -> None:
    """Give Megatron the steps that it looks for among the states: the Adam of a GPU has none there."""
    take, step_of = (
        optimizer._set_main_param_and_optimizer_states,
        optimizer._get_main_param_and_optimizer_states,
    )

    def take_with_step(parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        take(parameter, {"step": step_of(parameter)["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = take_with_step


def compare(wrapped: list[Any], optimizer: Any, parts: Parts) -> None:
    names = {parameter: name for name, parameter in named_parameters(wrapped).items()}
    seen = set()
    for parameter, name in names.items():
        same(name, parameter, parts[name]["master"].bfloat16(), slice(None))
    for one in inner_of(optimizer):
        for parameter in one.model_param_gbuf_map:
            span = one._get_model_param_range_map(parameter)["param"]
            held = one._get_main_param_and_optimizer_states(parameter)
            for state, key in (("master", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                same(names[parameter], held[key], parts[names[parameter]][state], slice(span.start, span.end))
            assert held["step"].item() == STEP
            seen.add(parameter)
    assert seen or not names


def same(name: str, found: torch.Tensor, whole: torch.Tensor, span: slice) -> None:
    """Compare a tensor, or a run of its elements; what pads the vocabulary is not anything's."""
    wanted, real = whole.reshape(-1)[span], torch.ones(whole.shape, dtype=torch.bool)
    if name.endswith(_PADDED):
        first = parallel_state.get_tensor_model_parallel_rank() * whole.shape[0]
        real[max(0, VOCAB - first) :] = False
    real = real.reshape(-1)[span]
    assert torch.equal(found.detach().reshape(-1)[real], wanted[real]), name


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    launch(run, parser_of().parse_args())
