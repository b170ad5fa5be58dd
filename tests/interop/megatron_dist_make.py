"""Saves tiny models of Megatron-Core and their optimizers from every rank, as Megatron-Core itself does.

Run it in an environment that has megatron-core (tests/interop/deepspeed.txt), never in ours:

    python -m tests.interop.megatron_dist_make OUT --kind llama --tensor 2 --data 2 --save fully_reshardable

All that is saved is Megatron-Core's own: `dist_checkpointing.save` (its torch_dist format), or for `--save
legacy` the distributed optimizer's `save_parameter_state` beside the model's legacy file. On a machine
without a GPU it is told that the CPU is one. OUT/golden.npz has the whole masters and moments by Megatron's
sharded keys, however they are saved; the weights are the masters, rounded.
"""

import argparse
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import (  # type: ignore[import-not-found]  # it has an environment of its own
    dist_checkpointing,
    parallel_state,
)
from megatron.core.distributed import (  # type: ignore[import-not-found]  # as above
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (  # type: ignore[import-not-found]  # as above
    OptimizerConfig,
    get_megatron_optimizer,
)
from torch.multiprocessing.spawn import spawn

from tests.interop.megatron_make import STATES, arguments_of, fill, folder_of, models_of, whole_models

STEP = 7
SAVES = ("plain", "fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter", "legacy")
Parts = dict[str, dict[str, torch.Tensor]]  # by the chunk's number and the name there


def take_the_cpu_for_a_gpu() -> None:
    """Have Megatron's optimizers work on the CPU: they ask for a GPU by its name."""
    type_of, tensor_of = torch.Tensor.type, torch.tensor

    def type_on_gpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_of(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    def tensor_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor_of(*args, **{key: value for key, value in kwargs.items() if key != "device"})

    torch.Tensor.type = type_on_gpu  # type: ignore[assignment, method-assign]  # the process is this script's own
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # as above
    torch.tensor = tensor_on_cpu
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]  # as above
    torch.cuda.synchronize = lambda *_: None


def optimizer_of(models: list[Any], options: argparse.Namespace) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        weight_decay=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=options.save != "plain",
    )
    return get_megatron_optimizer(config, models)


def inner_of(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def make_states(optimizer: Any) -> None:
    """Do a step: Megatron's optimizers can be asked for what they have only after one."""
    for one in inner_of(optimizer):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        one.optimizer.step()


def named_parameters(models: list[Any]) -> dict[str, torch.Tensor]:
    """Return the parameters of all chunks, by names that tell them apart."""
    return {
        f"{number}/{name.removeprefix('module.')}": parameter
        for number, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }


def give(models: list[Any], optimizer: Any, parts: Parts) -> None:
    """Give the optimizer's tensors their contents: whole ones, or this data-parallel rank's runs."""
    names = {parameter: name for name, parameter in named_parameters(models).items()}
    make_states(optimizer)
    for one in inner_of(optimizer):
        for states in one.optimizer.state.values():
            states["step"].fill_(STEP)
        if hasattr(one, "gbuf_ranges"):
            for parameter in one.model_param_gbuf_map:
                span = one._get_model_param_range_map(parameter)["param"]
                held = one._get_main_param_and_optimizer_states(parameter)
                put(held, parts[names[parameter]], slice(span.start, span.end))
        else:
            for group, masters in zip(one.float16_groups, one.fp32_from_float16_groups, strict=True):
                for parameter, master in zip(group, masters, strict=True):
                    held = {"param": master, **one.optimizer.state[master]}
                    put(held, parts[names[parameter]], slice(None))


def put(held: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], span: slice) -> None:
    for state, key in (("master", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        held[key].data.view(-1).copy_(whole[state].reshape(-1)[span])


def begin(rank: int, options: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    torch.set_num_threads(1)
    take_the_cpu_for_a_gpu()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_of(options))
    parallel_state.initialize_model_parallel(
        options.tensor,
        options.pipeline,
        options.virtual if options.virtual > 1 else None,
        expert_model_parallel_size=options.expert,
    )


def fill_parts(models: list[Any]) -> tuple[Parts, dict[str, np.ndarray]]:
    """Return what this rank's parameters and their states are to hold, and the whole tensors."""
    golden: dict[str, np.ndarray] = {}
    parts: Parts = {name: {} for name in named_parameters(models)}
    for state in STATES:
        for model in models:
            golden |= fill(model, f"{state}:")
        for name, parameter in named_parameters(models).items():
            parts[name][state] = parameter.detach().clone()
    return parts, golden


def wrap(models: list[Any], options: argparse.Namespace) -> tuple[list[Any], Any]:
    """Return the chunks of a model as Megatron trains them, and their optimizer."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=options.save != "plain")
    wrapped = [DistributedDataParallel(model.config, config, model.bfloat16()) for model in models]
    return wrapped, optimizer_of(wrapped, options)


def run(rank: int, options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    begin(rank, options)
    models = models_of(options)
    parts, golden = fill_parts(models)
    every: list[dict[str, np.ndarray]] = [{} for _ in range(world_of(options))]
    torch.distributed.all_gather_object(every, golden)
    if rank == 0:
        together = {key: value for one in every for key, value in one.items()}
        np.savez_compressed(os.path.join(options.out, "golden.npz"), allow_pickle=False, **together)
    wrapped, optimizer = wrap(models, options)
    for name, parameter in named_parameters(models).items():
        parameter.data.copy_(parts[name]["master"])
    give(wrapped, optimizer, parts)
    save(models, optimizer, options)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def save(models: list[Any], optimizer: Any, options: argparse.Namespace) -> None:
    root = Path(options.out, "checkpoint")
    folder = root / f"iter_{STEP:07}"
    state = {
        "args": arguments_of(options, is_distributed=options.save != "plain"),
        "checkpoint_version": 3.0,
        "iteration": STEP,
        "num_floating_point_operations_so_far": 1234,
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 10 * STEP},
    }
    if options.save == "legacy":
        folder /= folder_of(options)
        folder.mkdir(parents=True, exist_ok=True)
        if parallel_state.get_expert_data_parallel_rank() == 0:
            whole = {
                **state,
                **whole_models(models),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(whole, folder / "model_optim_rng.pt")
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        metadata: dict[str, Any] = {
            "singleton_local_shards": options.layers == "singleton",
            "chained_optim_avoid_prefix": True,
        }
        if options.layers == "numbered":
            metadata["non_homogeneous_layers"] = True
        if options.save != "plain":
            metadata["distrib_optim_sharding_type"] = options.save
        sharded = sharded_of(models, metadata)
        state |= {**sharded, "optimizer": optimizer.sharded_state_dict(sharded, metadata=metadata)}
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    (root / "latest_checkpointed_iteration.txt").write_text(str(STEP), encoding="utf-8")


def sharded_of(models: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what a distributed checkpoint has of the model: chunks are numbered if there are several."""
    keys = [f"model{number}" for number in range(len(models))] if len(models) > 1 else ["model"]
    return {key: model.sharded_state_dict(metadata=metadata) for key, model in zip(keys, models, strict=True)}


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--kind", choices=("gpt", "llama", "moe"), default="llama")
    for axis in ("tensor", "pipeline", "expert", "data", "virtual"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--layers", choices=("stacked", "numbered", "singleton"), default="stacked")
    parser.add_argument("--save", choices=SAVES, default="fully_reshardable")
    parser.add_argument("--port", type=int, default=29634)
    return parser


def world_of(options: argparse.Namespace) -> int:
    """Return how many ranks there are; experts are spread over those that hold the same of the rest."""
    return math.prod((options.tensor, options.pipeline, options.data))


def launch(run: Any, options: argparse.Namespace) -> None:
    os.makedirs(options.out, exist_ok=True)
    spawn(run, (options,), world_of(options))


if __name__ == "__main__":
    launch(run, parser_of().parse_args())
