"""What the arguments of a Megatron-LM run, which its checkpoints carry, say of the model's sizes."""

from collections.abc import Collection, Mapping
from typing import Any

from checkpoint.interop.formats.contract import LEAST_VOCAB, About
from checkpoint.interop.formats.inert import Record

_SIZES = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "hidden": "hidden_size",
    "inner": "ffn_hidden_size",
    "vocab": "vocab_size",
    "padded_vocab": "padded_vocab_size",
    "experts": "num_experts",
}


def arguments_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run that a file has."""
    said = tree.get("args")
    state = said.__dict__.get("state") if isinstance(said, Record) else said
    return dict(state) if isinstance(state, dict) else {}


def sizes_of(arguments: Mapping[str, Any], names: Collection[str]) -> dict[str, int]:
    """Return the sizes that rule documents ask for, as far as arguments and the tensors' names say them."""
    said = {key: value for key, value in arguments.items() if type(value) is int}
    sizes = {name: said[key] for name, key in _SIZES.items() if key in said}
    if "vocab" not in sizes and (least := _least_vocabulary(said)) is not None:
        sizes[LEAST_VOCAB] = least
    if arguments.get("group_query_attention") and "num_query_groups" in said:
        sizes["kv_heads"] = said["num_query_groups"]
    if "max_position_embeddings" in said and any(".position_embeddings." in name for name in names):
        sizes["positions"] = said["max_position_embeddings"]
    if "untie_embeddings_and_output_weights" in arguments:
        sizes["tied"] = int(not arguments["untie_embeddings_and_output_weights"])
    sizes["fused_norms"] = int(any(name.endswith(".linear_qkv.layer_norm_weight") for name in names))
    sizes["mlp_norm_named_fused"] = int(any(name.endswith(".linear_fc1.layer_norm_weight") for name in names))
    sizes["qkv_bias"] = int(any(name.endswith(".linear_qkv.bias") for name in names))
    return sizes


def _least_vocabulary(said: Mapping[str, int]) -> int | None:
    """Return how many words there are at least: Megatron pads to the next multiple of this for each rank."""
    names = ("padded_vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size")
    if not all(said.get(name, 0) > 0 for name in names):
        return None
    padded, multiple, ranks = (said[name] for name in names)
    return max(1, padded - multiple * ranks + 1)


def arguments_for(about: About) -> dict[str, Any]:
    """Return a run's arguments as the source tells them, and those that say a model's sizes."""
    told = about.extra.get("args")
    pairs = told.items() if isinstance(told, dict) else ()
    return {**{key: value for key, value in pairs if isinstance(key, str)}, **_said_by(about.sizes)}


def _said_by(sizes: Mapping[str, int]) -> dict[str, Any]:
    said: dict[str, Any] = {argument: sizes[name] for name, argument in _SIZES.items() if name in sizes}
    if "tied" in sizes:
        said["untie_embeddings_and_output_weights"] = not sizes["tied"]
    if "kv_heads" in sizes:
        said["num_query_groups"] = sizes["kv_heads"]
        said["group_query_attention"] = sizes["kv_heads"] != sizes.get("heads")
    return said
