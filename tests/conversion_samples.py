"""States to convert, saved as trainings save them, and their tensors by name as they come back."""

import torch

import checkpoint
from checkpoint.engine.tensors import flatten_state, raw_bytes


def save_state(store, state, *, step=3, run="made", meta=None) -> None:
    """Save a state through the engine, as one rank of a world of one."""
    num_bytes = sum(one.nbytes for one in flatten_state(state).tensors.values())
    host = checkpoint.LocalHost(store, arena_bytes=2 * num_bytes + (1 << 20))
    saver = checkpoint.Saver(host, run, checkpoint.SavePolicy())
    saver.save(step, state, checkpoint.Share.alone(), meta or {})
    saver.wait_captured()
    assert saver.drain(60)
    assert [type(one) for one in saver.outcomes()] == [checkpoint.Durable]
    saver.close()
    host.close()


def adam_state(weights) -> dict:
    """Return a training state around weights: as a Checkpointer saves it, all moments different."""
    torch.manual_seed(5)
    states = {
        name: {
            "step": torch.tensor(11.0),
            "exp_avg": torch.randn_like(weight, dtype=torch.float32),
            "exp_avg_sq": torch.rand_like(weight, dtype=torch.float32),
        }
        for name, weight in weights.items()
    }
    groups = [{"params": list(weights), "lr": 1e-3, "betas": (0.9, 0.95)}]
    return {
        "model": dict(weights),
        "optimizer": {"state": states, "param_groups": groups},
        "loop": {"cursor": {"epoch": 2, "sample": 1234}, "history": [1.5, 2.5]},
    }


def block_weights(width=24, layers=2, vocab=50, dtype=torch.float32) -> dict:
    """Return the weights of a small model with layers, whose names say what they are."""
    torch.manual_seed(1)
    weights = {"wte.weight": torch.randn(vocab, width, dtype=dtype)}
    for layer in range(layers):
        weights[f"h.{layer}.attn.qkv.weight"] = torch.randn(3 * width, width, dtype=dtype)
        weights[f"h.{layer}.attn.o_proj.weight"] = torch.randn(width, width, dtype=dtype)
        weights[f"h.{layer}.norm.bias"] = torch.randn(width, dtype=dtype)
    return weights


def bits_of(store, step=None) -> dict[str, tuple]:
    """Return (dtype, shape, bytes) of every tensor of a checkpoint, by name."""
    found = flatten_state(checkpoint.load(store, step).state).tensors
    return {name: (one.dtype, tuple(one.shape), raw_bytes(one).tobytes()) for name, one in found.items()}
