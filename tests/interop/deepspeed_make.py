"""Trains a tiny model with DeepSpeed itself and saves it, with the tensors that DeepSpeed says it has.

Run it in an environment that has DeepSpeed (tests/interop/deepspeed.txt), never in ours:

    python -m tests.interop.deepspeed_make OUT --stage 2 --dtype bf16 --world 3

OUT/checkpoint is what the engine saves after two steps, or with `--load FOLDER --universal --steps 0` right
after loading. OUT/golden.npz has every parameter's fp32 master and moments, as DeepSpeed's own
safe_get_full_* functions gather them.
"""

import argparse
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

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
        "WORLD_SIZE": str(options.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(options.port),
    }
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = Tiny()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(options))
    if options.load:
        path, _ = engine.load_checkpoint(options.load, tag=options.tag)
        if path is None:
            sys.exit("DeepSpeed loaded nothing")
    for step in range(options.steps):
        torch.manual_seed(100 * step + rank)
        engine.backward(engine(torch.randint(0, 11, (9,))))
        engine.step()
    golden = golden_of(engine)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--sub-group", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--port", type=int, default=29533)
    parser.add_argument("--load")
    parser.add_argument("--tag")
    parser.add_argument("--universal", action="store_true")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    spawn(run, (options,), options.world)


if __name__ == "__main__":
    main()
