"""Trains a tiny model with DeepSpeed itself and saves it, with the tensors that DeepSpeed says it has.

Run it in an environment that has DeepSpeed (tests/interop/deepspeed.txt), never in ours:

    python -m tests.interop.deepspeed_make OUT --stage 2 --dtype bf16 --world 3

OUT/checkpoint is what the engine saves after two steps, or with `--load FOLDER --universal --steps 0` right
after loading. OUT/golden.npz has every parameter's fp32 master and moments, as DeepSpeed's own
safe_get_full_* functions gather them. With `--tensor 2`, each rank of the world is two that divide layers
between them; the tensors in golden.npz are the whole ones.
"""

import argparse
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

from typing import Any

import deepspeed  # type: ignore[import-not-found]  # it has an environment of its own
import numpy as np
import torch
from deepspeed.utils import (  # type: ignore[import-not-found]  # as above
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from torch.multiprocessing.spawn import spawn


class Tiny(torch.nn.Module):
    """Odd sizes, a tied weight, a buffer, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.frozen = torch.nn.Linear(6, 6, bias=False)
        self.up = torch.nn.Linear(6, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.down = torch.nn.Linear(13, 6, bias=False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad = False
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embed(tokens))
        hidden = hidden + self.down(self.norm(torch.relu(self.up(hidden))))
        return torch.nn.functional.cross_entropy(self.head(hidden).float(), tokens.roll(1))


CUT_DIMS = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


class Divided(torch.nn.Module):
    """Two layers that tensor-parallel ranks divide, as Megatron does, between layers that each has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.up = torch.nn.Linear(6, 14)
        self.down = torch.nn.Linear(14, 6, bias=False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def divide(self, ranks: "Ranks") -> None:
        self.group = ranks.get_model_parallel_group()
        for name, dim in CUT_DIMS.items():
            layer, key = name.split(".")
            whole = getattr(getattr(self, layer), key).detach()
            part = whole.chunk(ranks.get_model_parallel_world_size(), dim)[ranks.get_model_parallel_rank()]
            setattr(getattr(self, layer), key, torch.nn.Parameter(part.contiguous().clone()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        inner = torch.relu(self.up(SumGradients.apply(self.norm(hidden), self.group)))
        hidden = hidden + Sum.apply(self.down(inner), self.group)
        return torch.nn.functional.cross_entropy(self.head(hidden).float(), tokens.roll(1))


class SumGradients(torch.autograd.Function):
    """Hands a tensor on to all ranks' parts of a layer."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        return summed(gradient, ctx.group), None


class Sum(torch.autograd.Function):
    """Adds up what all ranks' parts of a layer make."""

    @staticmethod
    def forward(ctx, tensor, group):
        return summed(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def summed(tensor: torch.Tensor, group) -> torch.Tensor:
    total = tensor.float().clone()
    torch.distributed.all_reduce(total, group=group)
    return total.to(tensor.dtype)


class Ranks:
    """What DeepSpeed calls an mpu: which ranks divide the model, and which have the same part of it."""

    def __init__(self, rank: int, tensor: int, data: int) -> None:
        self.tensor, self.data = tensor, data
        self.tensor_rank, self.data_rank = rank % tensor, rank // tensor
        for one in range(data):
            group = torch.distributed.new_group([one * tensor + other for other in range(tensor)])
            if one == self.data_rank:
                self.tensor_group = group
        for one in range(tensor):
            members = [one + tensor * other for other in range(data)]
            group = torch.distributed.new_group(members)
            if one == self.tensor_rank:
                self.data_group, self.data_members = group, members

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor

    def get_model_parallel_group(self):
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data

    def get_data_parallel_group(self):
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.data_members


def config_of(options: argparse.Namespace) -> dict:
    zero = {"stage": options.stage}
    if options.stage == 3:
        zero |= {"sub_group_size": options.sub_group, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": options.universal},
    }
    if options.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if options.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4}
    return config


def run(rank: int, options: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(options.world * options.tensor),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(options.port),
    }
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    ranks = Ranks(rank, options.tensor, options.world) if options.tensor > 1 else None
    model: Any = Divided() if ranks else Tiny()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if ranks:
        model.divide(ranks)
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(options), mpu=ranks)
    if options.load:
        path, _ = engine.load_checkpoint(options.load, tag=options.tag)
        if path is None:
            sys.exit("DeepSpeed loaded nothing")
    for step in range(options.steps):
        torch.manual_seed(100 * step + rank // options.tensor)
        engine.backward(engine(torch.randint(0, 11, (9,))))
        engine.step()
    golden = golden_of(engine)
    if ranks:
        golden = whole_of(golden, ranks)
    if rank == 0:
        np.savez(os.path.join(options.out, "golden.npz"), allow_pickle=False, **golden)
    engine.save_checkpoint(os.path.join(options.out, "checkpoint"), client_state={"cursor": 17})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def golden_of(engine: "deepspeed.DeepSpeedEngine") -> dict[str, np.ndarray]:
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # linked too early if there are two groups
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        states = {"master": safe_get_full_fp32_param(parameter)}
        states |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        for state, value in states.items():
            if value is not None:
                found[f"optimizer.{state}.{name}"] = value.detach().float().numpy().copy()
    for name, buffer in engine.module.named_buffers():
        found[name] = buffer.detach().float().numpy().copy()
    return found


def whole_of(golden: dict[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
    """Put the tensor-parallel ranks' parts together; what each has whole is the same on all."""
    parts: list = [None] * ranks.tensor
    torch.distributed.all_gather_object(parts, golden, group=ranks.tensor_group)
    whole = {}
    for name, mine in golden.items():
        each = [part[name] for part in parts]
        dim = CUT_DIMS.get(".".join(name.split(".")[-2:]))
        if dim is None and any(not np.array_equal(one, mine) for one in each):
            sys.exit(f"{name} differs between tensor-parallel ranks")
        whole[name] = mine if dim is None else np.concatenate(each, dim)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sub-group", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--port", type=int, default=29533)
    parser.add_argument("--load")
    parser.add_argument("--tag")
    parser.add_argument("--universal", action="store_true")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    spawn(run, (options,), options.world * options.tensor)


if __name__ == "__main__":
    main()
