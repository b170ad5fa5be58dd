"""What config.json of a Hugging Face model says to the rule language: sizes, and which rule set fits."""

from collections.abc import Collection, Mapping
from typing import Any

_GPT = {
    "layers": "n_layer",
    "heads": "n_head",
    "hidden": "n_embd",
    "inner": "n_inner",
    "vocab": "vocab_size",
    "positions": "n_positions",
}
_MODERN = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "vocab": "vocab_size",
}
_LLAMA = {**_MODERN, "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "gpt2": _GPT,
    "gpt_neox": _MODERN,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "mixtral": {**_LLAMA, "experts": "num_local_experts"},
}
_RULES = {
    "gpt2": "gpt2-hf",
    "gpt_neox": "neox-hf",
    "llama": "llama-hf",
    "mistral": "llama-hf",
    "qwen2": "llama-hf",
    "mixtral": "mixtral-hf",
}
_TIED_BY_DEFAULT = {"gpt2"}
_DTYPES = ("torch_dtype", "dtype")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel")
_HEAD = ("lm_head.weight", "model.embed_tokens.weight")
_HEADS = {
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "gpt_neox": ("embed_out.weight", "gpt_neox.embed_in.weight"),
}


def rules_for(config: Mapping[str, Any]) -> str | None:
    """Return the name of the built-in rule set for a model's configuration, if there is one."""
    return _RULES.get(str(config.get("model_type")))


def retyped(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration of a model whose weights were cast, as far as it tells their type.

    A model of several (`text_config`, `vision_config`) tells it of each.
    """
    parts = {
        name: retyped(part, dtype)
        for name, part in config.items()
        if name.endswith("_config") and name != "quantization_config" and isinstance(part, dict)
    }
    return {**config, **parts, **{name: dtype for name in _DTYPES if name in config}}


def ties_from(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Return which output layer is the embedding's other name, if a model has one and the files do not."""
    kind = str(config.get("model_type"))
    told = config.get("architectures")
    has_head = isinstance(told, list) and any(str(one).endswith(_WITH_HEAD) for one in told)
    if not has_head or not config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT):
        return {}
    head, embedding = _HEADS.get(kind, _HEAD)
    return {head: embedding} if embedding in names and head not in names else {}


def sizes_from(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes that a model's rule set asks for, as far as its configuration tells them."""
    kind = str(config.get("model_type"))
    fields = _FIELDS.get(kind, {})
    sizes = {name: config[field] for name, field in fields.items() if type(config.get(field)) is int}
    if not fields:
        return sizes
    sizes["tied"] = int(bool(config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT)))
    if sizes.get("heads") and "hidden" in sizes:
        sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    if "kv_heads" in fields:
        sizes["qkv_bias"] = int(kind == "qwen2" or bool(config.get("attention_bias", False)))
    if kind == "mixtral":
        del sizes["qkv_bias"]
    return sizes
