"""What the tensors of the models that `megatron_make` builds are, said without any rule."""

import numpy as np

RULES = {"llama": "llama-megatron", "gpt": "gpt-megatron", "moe": "mixtral-megatron"}
Arrays = dict[str, np.ndarray]


def expected(kind: str, golden: Arrays, prefix: str) -> Arrays:
    """Say, without any rule, which global tensors Megatron's own are."""
    whole = {name.removeprefix(prefix): bits for name, bits in golden.items() if name.startswith(prefix)}
    whole = {name: bits for name, bits in whole.items() if ":" not in name}
    found = {"embedding.weight": whole["embedding.word_embeddings.weight"][:29]}
    if kind == "gpt":
        found["positions.weight"] = whole["embedding.position_embeddings.weight"]
    else:
        found["head.weight"] = whole["output_layer.weight"][:29]
    for part in ("weight", "bias") if kind == "gpt" else ("weight",):
        found[f"final_norm.{part}"] = whole[f"decoder.final_layernorm.{part}"]
        for layer in range(2 if kind == "moe" else 4):
            one = {
                name.removeprefix("decoder.layers."): bits[layer]
                for name, bits in whole.items()
                if name.startswith("decoder.layers.") and "experts" not in name
            }
            to = f"layers.{layer}"
            groups = 4 if kind == "gpt" else 2
            qkv = one[f"self_attention.linear_qkv.{part}"]
            qkv = qkv.reshape(groups, 4 // groups + 2, 2, *qkv.shape[1:])
            found[f"{to}.attention.q.{part}"] = qkv[:, :-2].reshape(8, *qkv.shape[3:])
            found[f"{to}.attention.k.{part}"] = qkv[:, -2].reshape(groups * 2, *qkv.shape[3:])
            found[f"{to}.attention.v.{part}"] = qkv[:, -1].reshape(groups * 2, *qkv.shape[3:])
            found[f"{to}.attention.out.{part}"] = one[f"self_attention.linear_proj.{part}"]
            norms = [f"self_attention.linear_qkv.layer_norm_{part}", f"input_layernorm.{part}"]
            found[f"{to}.attention_norm.{part}"] = next(one[name] for name in norms if name in one)
            norms = [f"mlp.linear_fc1.layer_norm_{part}", f"pre_mlp_layernorm.{part}"]
            found[f"{to}.mlp_norm.{part}"] = next(one[name] for name in norms if name in one)
            if kind == "gpt":
                found[f"{to}.mlp.up.{part}"] = one[f"mlp.linear_fc1.{part}"]
                found[f"{to}.mlp.down.{part}"] = one[f"mlp.linear_fc2.{part}"]
            elif kind == "llama":
                gate, up = np.split(one["mlp.linear_fc1.weight"], 2)
                found |= {f"{to}.mlp.gate.weight": gate, f"{to}.mlp.up.weight": up}
                found[f"{to}.mlp.down.weight"] = one["mlp.linear_fc2.weight"]
            else:
                found[f"{to}.router.weight"] = one["mlp.router.weight"]
                experts = "decoder.layers.mlp.experts.experts.linear_fc"
                for expert in range(4):
                    gate, up = np.split(whole[f"{experts}1.weight"][layer, expert], 2)
                    head = f"{to}.experts.{expert}"
                    found |= {f"{head}.gate.weight": gate, f"{head}.up.weight": up}
                    found[f"{head}.down.weight"] = whole[f"{experts}2.weight"][layer, expert]
    return found
