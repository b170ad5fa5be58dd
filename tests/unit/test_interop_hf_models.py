"""Models that Hugging Face saved: what the rules read computes the logits that its own models computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
from tests.interop.unpacking import unpack

MODELS = ("gpt2", "llama", "mixtral")
HEADS, HEAD_DIM, LAYERS, CHOSEN = 4, 4, 2, 2
Weights = dict[str, torch.Tensor]
# Pieces of equal shape, by their global names: each pair is exchanged, in a mutation.
LIKE = {
    "gpt2": (("layers.0.attention.q.weight", "layers.0.attention.k.weight"),),
    "llama": (
        ("layers.0.mlp.gate.weight", "layers.0.mlp.up.weight"),
        ("layers.1.attention.k.weight", "layers.1.attention.v.weight"),
    ),
    "mixtral": (
        ("layers.0.experts.1.gate.weight", "layers.0.experts.1.up.weight"),
        ("layers.1.experts.0.down.weight", "layers.1.experts.2.down.weight"),
        ("embedding.weight", "head.weight"),
    ),
}


def imported(name: str, folder: Path, store: str) -> Weights:
    adoption = checkpoint.Adoption(rules=checkpoint.choose_rules(f"{name}-hf", ()))
    report = checkpoint.import_foreign(str(folder), checkpoint.open_store(store), adoption)
    assert {proof.how for proof in report.proofs} == {"fingerprint"}
    weights: Weights = checkpoint.load(checkpoint.open_store(store)).state["model"]
    return weights


def logits_of(name: str, weights: Weights, tokens: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Compute a model from global tensors alone."""
    x = weights["embedding.weight"][torch.from_numpy(tokens)]
    if name == "gpt2":
        x = x + weights["positions.weight"][: x.shape[-2]]
    for number in range(LAYERS):
        layer = f"layers.{number}"
        x = x + attended(name, weights, layer, normed(weights, f"{layer}.attention_norm", x, config), config)
        x = x + thought(name, weights, layer, normed(weights, f"{layer}.mlp_norm", x, config))
    out = weights.get("head.weight", weights["embedding.weight"])
    return (normed(weights, "final_norm", x, config) @ out.T).numpy()


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def normed(weights: Weights, name: str, x: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    scale, shift = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if shift is not None:
        return F.layer_norm(x, scale.shape, scale, shift, config["layer_norm_epsilon"])
    return F.rms_norm(x, scale.shape, scale, config["rms_norm_eps"])


def attended(
    name: str, weights: Weights, layer: str, x: torch.Tensor, config: dict[str, Any]
) -> torch.Tensor:
    q, k, v = (
        linear(weights, f"{layer}.attention.{part}", x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for part in "qkv"
    )
    if name != "gpt2":
        q, k = (rotated(each, config["rope_parameters"]["rope_theta"]) for each in (q, k))
    k, v = (each.repeat_interleave(HEADS // each.shape[1], 1) for each in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(weights, f"{layer}.attention.out", mixed.transpose(1, 2).flatten(-2))


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Turn the halves of each head by its position (Su et al., RoFormer, 2021)."""
    angle = torch.arange(x.shape[-2])[:, None] * base ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    one, other = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def thought(name: str, weights: Weights, layer: str, x: torch.Tensor) -> torch.Tensor:
    if name == "gpt2":
        hidden = F.gelu(linear(weights, f"{layer}.mlp.up", x), approximate="tanh")
        return linear(weights, f"{layer}.mlp.down", hidden)
    if name == "llama":
        return gated(weights, f"{layer}.mlp", x)
    chances, experts = linear(weights, f"{layer}.router", x).softmax(-1).topk(CHOSEN)
    shares = chances / chances.sum(-1, keepdim=True)
    outputs = [gated(weights, f"{layer}.experts.{number}", x) for number in range(4)]
    each = torch.stack(outputs, -2).gather(-2, experts[..., None].expand(*experts.shape, x.shape[-1]))
    return (shares[..., None] * each).sum(-2)


def gated(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    opened = F.silu(linear(weights, f"{name}.gate", x))
    return linear(weights, f"{name}.down", opened * linear(weights, f"{name}.up", x))


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_bytes()))


@pytest.mark.parametrize("name", MODELS)
def test_next_token_logits_are_those_of_hugging_face(name, tmp_path):
    folder, golden = unpack(f"{name}-hf", tmp_path)
    weights = imported(name, folder, str(tmp_path / "store"))
    found = logits_of(name, weights, golden["tokens"], config_of(folder))
    assert np.abs(found - golden["logits"]).max() < 1e-4 < np.abs(golden["logits"]).max() / 1000
    assert (found.argmax(-1) == golden["logits"].argmax(-1)).all()


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name in MODELS for pair in LIKE[name]])
def test_pieces_that_change_places_would_compute_other_logits(name, pair, tmp_path):
    folder, golden = unpack(f"{name}-hf", tmp_path)
    weights = imported(name, folder, str(tmp_path / "store"))
    one, other = pair
    weights[one], weights[other] = weights[other], weights[one]
    found = logits_of(name, weights, golden["tokens"], config_of(folder))
    assert np.abs(found - golden["logits"]).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_out_again_is_the_file_that_hugging_face_wrote(name, tmp_path):
    folder, _ = unpack(f"{name}-hf", tmp_path)
    imported(name, folder, str(tmp_path / "store"))
    check_back(name, str(tmp_path / "store"), folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_by_way_of_megatron_s_tensor_ranks_it_is_the_same_file(name, tmp_path):
    folder, _ = unpack(f"{name}-hf", tmp_path)
    imported(name, folder, str(tmp_path / "store"))
    store, ranks = str(tmp_path / "store"), str(tmp_path / "ranks")
    rules = checkpoint.choose_rules(f"{name}-megatron", ("padded_vocab=32",))
    emigration = checkpoint.Emigration("megatron", to="tensor=2", rules=rules)
    checkpoint.export_foreign(checkpoint.Whereabouts(store), ranks, emigration)
    again = checkpoint.open_store(str(tmp_path / "again"))
    checkpoint.import_foreign(ranks, again, checkpoint.Adoption(rules=rules))
    check_back(name, str(again), folder, tmp_path / "out")


def check_back(name: str, store: str, folder: Path, out: Path) -> None:
    """Export a store by the rules of Hugging Face; see that the file is the one in a folder."""
    emigration = checkpoint.Emigration("hf", rules=checkpoint.choose_rules(f"{name}-hf", ()))
    checkpoint.export_foreign(checkpoint.Whereabouts(store), str(out), emigration)
    given, back = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert back.keys() == given.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in given.items())
