"""The built-in rules cut weights so that the ranks together compute what the whole model does."""

import numpy as np
import pytest

from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.writing import plan_export
from tests.interop_samples import LLAMA, disperse, llama, specs_for

AXES = {"tensor": 3, "pipeline": 2}


def silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-x)))


def test_the_gated_mlp_of_the_ranks_computes_what_the_global_weights_do():
    """Each rank: y = down (silu(first half) * second half) of its fused weight; the sum is the layer's."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=bits.shape).astype(np.float32) for name, bits in llama().items()}
    bits = {name: array.view(np.uint32) for name, array in weights.items()}
    plan = plan_export(builtin_rules("llama-megatron"), LLAMA, AXES, specs_for(bits))
    files = {
        str(t): array.view(np.float32) for t, array in zip(plan.foreign, disperse(plan, bits), strict=True)
    }
    x = random.normal(size=(5, 10)).astype(np.float32)
    total = np.zeros((5, 10), np.float32)
    for rank in range(3):
        where = f"(tensor={rank}, pipeline=1)"
        h = x @ files[f"decoder.layers.1.mlp.linear_fc1.weight {where}"].T
        gate, up = np.split(h, 2, axis=1)
        total += (silu(gate) * up) @ files[f"decoder.layers.1.mlp.linear_fc2.weight {where}"].T
    w = {part: weights[f"layers.3.mlp.{part}.weight"] for part in ("gate", "up", "down")}
    assert np.allclose(total, (silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T, atol=1e-3)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.exp(q @ k.T / np.sqrt(q.shape[1]))
    return np.asarray(scores / scores.sum(1, keepdims=True) @ v)


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1)])
def test_the_grouped_attention_of_the_ranks_computes_what_the_global_weights_do(groups):
    """Each rank views its fused output as (group, queries + key + value, head_dim); a group has two heads."""
    random = np.random.default_rng(1)
    weights = {name: random.normal(size=bits.shape).astype(np.float32) for name, bits in llama().items()}
    bits = {name: array.view(np.uint32) for name, array in weights.items()}
    sizes, axes = {**LLAMA, "kv_heads": groups}, {"tensor": len(groups)}
    plan = plan_export(builtin_rules("llama-megatron"), sizes, axes, specs_for(bits))
    files = {
        str(t): array.view(np.float32) for t, array in zip(plan.foreign, disperse(plan, bits), strict=True)
    }
    x = random.normal(size=(5, 10)).astype(np.float32)
    total = np.zeros((5, 10), np.float32)
    for rank, count in enumerate(groups):
        where = f"(tensor={rank})"
        mixed = x @ files[f"decoder.layers.2.self_attention.linear_qkv.weight {where}"].T
        mixed = mixed.reshape(5, count, 4, 2)
        heads = [
            attend(mixed[:, g, h], mixed[:, g, 2], mixed[:, g, 3]) for g in range(count) for h in range(2)
        ]
        proj = files[f"decoder.layers.2.self_attention.linear_proj.weight {where}"]
        total += np.concatenate(heads, axis=1) @ proj.T
    q, k, v = (x @ weights[f"layers.2.attention.{part}.weight"].T for part in "qkv")
    expected = []
    for head in range(6):
        kv = slice(2 * (head // 2), 2 * (head // 2) + 2)
        expected.append(attend(q[:, 2 * head : 2 * head + 2], k[:, kv], v[:, kv]))
    whole = np.concatenate(expected, axis=1) @ weights["layers.2.attention.out.weight"].T
    assert np.allclose(total, whole, atol=1e-3)
