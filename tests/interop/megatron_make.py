"""Builds tiny models of Megatron-Core on every rank and saves them as Megatron-LM does in its legacy layout.

Run it in an environment that has megatron-core (tests/interop/deepspeed.txt), never in ours:

    python -m tests.interop.megatron_make OUT --kind llama --tensor 2 --pipeline 2

The names, shapes and parts of the model are Megatron-Core's own. The file around them (args, iteration,
optimizer of `Float16OptimizerWithFloat16Params`) is laid out as Megatron-LM's training/checkpointing.py and
megatron/core/optimizer/optimizer.py document it. OUT/golden.npz has the whole tensors, which Megatron-Core's
sharded_state_dict says how to put together; layers are stacked there.
"""

import argparse
import math
import os
import warnings
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state  # type: ignore[import-not-found]  # it has an environment of its own
from megatron.core.dist_checkpointing.mapping import (  # type: ignore[import-not-found]  # as above
    ShardedTensor,
    apply_factories,
)
from megatron.core.models.gpt import GPTModel  # type: ignore[import-not-found]  # as above
from megatron.core.models.gpt.gpt_layer_specs import (  # type: ignore[import-not-found]  # as above
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.transformer_config import (  # type: ignore[import-not-found]  # as above
    TransformerConfig,
)
from torch.multiprocessing.spawn import spawn

VOCAB, PADDED, POSITIONS = 29, 32, 12
STATES = ("exp_avg", "exp_avg_sq", "master")


def layers_of(options: argparse.Namespace) -> int:
    return 2 if options.kind == "moe" else 4


def models_of(options: argparse.Namespace) -> list[Any]:
    """Return a rank's chunks of the model: one, or with an interleaved schedule several."""
    return [model_of(options, number) for number in range(options.virtual)]


def model_of(options: argparse.Namespace, chunk: int = 0) -> Any:
    is_gpt = options.kind == "gpt"
    more = (
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_grouped_gemm": False}
        if options.kind == "moe"
        else {}
    )
    config = TransformerConfig(
        num_layers=layers_of(options),
        hidden_size=8,
        num_attention_heads=4,
        num_query_groups=4 if is_gpt else 2,
        ffn_hidden_size=12,
        gated_linear_unit=not is_gpt,
        add_bias_linear=is_gpt,
        normalization="LayerNorm" if is_gpt else "RMSNorm",
        use_cpu_initialization=True,
        tensor_model_parallel_size=options.tensor,
        pipeline_model_parallel_size=options.pipeline,
        expert_model_parallel_size=options.expert,
        virtual_pipeline_model_parallel_size=options.virtual if options.virtual > 1 else None,
        pipeline_dtype=torch.float32,
        sequence_parallel=options.kind == "moe" and options.tensor > 1,
        **more,
    )
    stage = {"ignore_virtual": False, "vp_stage": chunk} if options.virtual > 1 else {}
    spec = get_gpt_layer_local_spec(
        num_experts=more.get("num_moe_experts"), normalization="LayerNorm" if is_gpt else "RMSNorm"
    )
    return GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=POSITIONS,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        vp_stage=stage.get("vp_stage"),
        share_embeddings_and_output_weights=is_gpt,
        position_embedding_type="learned_absolute" if is_gpt else "rope",
    )


def pieces_of(model: Any) -> list[ShardedTensor]:
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    found, pending = [], [sharded]
    while pending:
        node = pending.pop()
        if isinstance(node, ShardedTensor):
            found.append(node)
        elif isinstance(node, dict | list):
            pending += node.values() if isinstance(node, dict) else node
    return found


def whole_of(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the content that a tensor of this name is to have, the same on every rank."""
    seed = sum(number * ord(letter) for number, letter in enumerate(key, 1))
    return np.random.default_rng(seed).integers(-999, 1000, shape).astype(np.float32) / 256  # packs well


def fill(model: Any, prefix: str) -> dict[str, np.ndarray]:
    """Give every part of the model its box of the whole tensor; return the whole tensors."""
    whole = {}
    for piece in pieces_of(model):
        # A weight is its master, rounded, as after any step.
        content = whole_of((prefix or "master:") + piece.key, tuple(piece.global_shape))
        box = tuple(slice(a, a + 1) for a in piece.global_offset[: piece.prepend_axis_num])
        rest = zip(piece.global_offset[piece.prepend_axis_num :], piece.local_shape, strict=True)
        part = content[(*box, *(slice(a, a + n) for a, n in rest))]
        piece.data.data.copy_(torch.from_numpy(part.reshape(piece.local_shape).copy()))
        whole[prefix + piece.key] = content
    return whole


def begin(rank: int, options: argparse.Namespace) -> None:
    world = options.tensor * options.pipeline * options.expert
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # tied weights go there
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        options.tensor,
        options.pipeline,
        options.virtual if options.virtual > 1 else None,
        expert_model_parallel_size=options.expert,
    )


def run(rank: int, options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    begin(rank, options)
    models = models_of(options)
    states = {}
    golden: dict[str, np.ndarray] = {}
    for state in STATES:
        for model in models:
            golden |= fill(model, f"{state}:")
        states[state] = [parameter.detach().clone() for model in models for parameter in model.parameters()]
    for model in models:
        golden |= fill(model, "")
    every: list[dict[str, np.ndarray]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(every, golden)
    if rank == 0:
        together = {key: value for one in every for key, value in one.items()}
        np.savez(os.path.join(options.out, "golden.npz"), allow_pickle=False, **together)
    save([model.bfloat16() for model in models], states, options)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def save(models: list[Any], states: dict[str, list[torch.Tensor]], options: argparse.Namespace) -> None:
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) and options.expert == 1:
        return
    tree = {
        "args": arguments_of(options, is_distributed=False),
        "checkpoint_version": 3.0,
        "iteration": 7,
        **whole_models(models),
        "optimizer": optimizer_of(models, states),
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 70},
        "num_floating_point_operations_so_far": 1234,
    }
    path = os.path.join(options.out, "checkpoint", "iter_0000007", folder_of(options))
    os.makedirs(path, exist_ok=True)
    torch.save(tree, os.path.join(path, "model_optim_rng.pt"))
    with open(os.path.join(options.out, "checkpoint", "latest_checkpointed_iteration.txt"), "w") as file:
        file.write("7")


def whole_models(models: list[Any]) -> dict[str, Any]:
    """Return what a legacy file has of the model: chunks are numbered if there are several."""
    keys = [f"model{number}" for number in range(len(models))] if len(models) > 1 else ["model"]
    return {key: model.state_dict_for_save_checkpoint() for key, model in zip(keys, models, strict=True)}


def folder_of(options: argparse.Namespace) -> str:
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    folder = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if options.pipeline > 1 else "")
    if options.expert > 1:
        folder += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return folder


def arguments_of(options: argparse.Namespace, *, is_distributed: bool) -> argparse.Namespace:
    is_gpt = options.kind == "gpt"
    return argparse.Namespace(
        tensor_model_parallel_size=options.tensor,
        pipeline_model_parallel_size=options.pipeline,
        expert_model_parallel_size=options.expert,
        virtual_pipeline_model_parallel_size=options.virtual if options.virtual > 1 else None,
        num_layers=layers_of(options),
        hidden_size=8,
        num_attention_heads=4,
        group_query_attention=not is_gpt,
        num_query_groups=2,
        kv_channels=2,
        ffn_hidden_size=12,
        vocab_size=VOCAB,
        padded_vocab_size=PADDED,
        max_position_embeddings=POSITIONS,
        position_embedding_type="learned_absolute" if is_gpt else "rope",
        untie_embeddings_and_output_weights=not is_gpt,
        num_experts=4 if options.kind == "moe" else None,
        use_distributed_optimizer=is_distributed,
        params_dtype=torch.bfloat16,
    )


def optimizer_of(models: list[Any], states: dict[str, list[torch.Tensor]]) -> dict | list:
    """Return what an optimizer says; experts that are spread over ranks have one of their own, after it."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    dense = [n for n, p in enumerate(parameters) if getattr(p, "allreduce", True)]
    experts = [n for n in range(len(parameters)) if n not in dense]
    found = [one_optimizer(parameters, chosen, states) for chosen in (dense, experts) if chosen]
    return found if experts else found[0]


def one_optimizer(
    parameters: list[torch.Tensor], chosen: list[int], states: dict[str, list[torch.Tensor]]
) -> dict:
    """Group the parameters as Megatron does: those that decay, and biases and norms, which do not."""
    groups = [[n for n in chosen if (parameters[n].dim() > 1) is decays] for decays in (True, False)]
    groups = [group for group in groups if group]
    order = [number for group in groups for number in group]
    begins = np.cumsum([0, *map(len, groups)])
    return {
        "optimizer": {
            "state": {
                place: {state: states[state][number] for state in STATES[:2]}
                for place, number in enumerate(order)
            },
            "param_groups": [
                {
                    "lr": 0.1,
                    "step": 7,
                    "wd_mult": 1.0,
                    "params": list(range(int(begins[n]), int(begins[n + 1]))),
                }
                for n in range(len(groups))
            ],
        },
        "fp32_from_fp16_params": [[states["master"][number] for number in group] for group in groups],
    }


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--kind", choices=("gpt", "llama", "moe"), default="llama")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--virtual", type=int, default=1)
    parser.add_argument("--port", type=int, default=29633)
    return parser


def main() -> None:
    options = parser_of().parse_args()
    os.makedirs(options.out, exist_ok=True)
    spawn(run, (options,), math.prod((options.tensor, options.pipeline, options.expert)))


if __name__ == "__main__":
    main()
