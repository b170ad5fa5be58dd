"""A GPT-NeoX that Hugging Face saved: what the rules read computes the logits that its model computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign, import_foreign
from checkpoint.interop.conversion.importing import Adoption
from checkpoint.interop.conversion.ruled import RuleChoice, choose_rules
from tests.interop.unpacking import unpack

HEADS, HEAD_DIM, ROTARY, EPS = 4, 4, 2, 1e-5
SIZES = ("layers=2", "heads=4", "head_dim=4", "inner=40", "vocab=29")
Weights = dict[str, torch.Tensor]


def rules() -> RuleChoice:
    return choose_rules("neox-hf", SIZES)


def imported(folder: Path, store: str) -> Weights:
    report = import_foreign(str(folder), checkpoint.open_store(store), Adoption(rules=rules()))
    assert {proof.how for proof in report.proofs} == {"fingerprint"}
    weights: Weights = checkpoint.load(checkpoint.open_store(store)).state["model"]
    return weights


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return torch.nn.functional.layer_norm(x, scale.shape, scale, shift, EPS)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Turn the first dims of each head by its position (Su et al., RoFormer, 2021)."""
    turned, kept = x[..., :ROTARY], x[..., ROTARY:]
    speed = 10000.0 ** -(torch.arange(0, ROTARY, 2) / ROTARY)
    angle = torch.arange(x.shape[-2])[:, None] * speed
    one, other = turned.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin, kept], -1)


def attention(weights: Weights, layer: str, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        linear(weights, f"{layer}.attention.{part}", x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        for part in "qkv"
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    return linear(weights, f"{layer}.attention.out", mixed.transpose(1, 2).flatten(-2))


def logits_of(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Compute a GPT-NeoX from global tensors alone: attention and MLP both read the layer's input."""
    x = weights["embedding.weight"][torch.from_numpy(tokens)]
    for number in range(2):
        layer = f"layers.{number}"
        hidden = torch.nn.functional.gelu(
            linear(weights, f"{layer}.mlp.up", norm(weights, f"{layer}.mlp_norm", x))
        )
        x = (
            x
            + attention(weights, layer, norm(weights, f"{layer}.attention_norm", x))
            + linear(weights, f"{layer}.mlp.down", hidden)
        )
    return (norm(weights, "final_norm", x) @ weights["head.weight"].T).numpy()


def test_next_token_logits_are_those_of_hugging_face(tmp_path):
    folder, golden = unpack("neox-hf", tmp_path)
    weights = imported(folder, str(tmp_path / "store"))
    found = logits_of(weights, golden["tokens"])
    assert np.abs(found - golden["logits"]).max() < 1e-4 < np.abs(golden["logits"]).max() / 1000
    assert (found.argmax(-1) == golden["logits"].argmax(-1)).all()


def test_another_order_of_q_k_and_v_computes_other_logits(tmp_path):
    """The blocks of all heads' queries, keys and values instead of each head's three: shapes agree."""
    folder, golden = unpack("neox-hf", tmp_path)
    weights = imported(folder, str(tmp_path / "store"))
    for number in range(2):
        for part in ("weight", "bias"):
            names = [f"layers.{number}.attention.{one}.{part}" for one in "qkv"]
            heads = [weights[name].unflatten(0, (HEADS, HEAD_DIM)) for name in names]
            blocks = torch.stack(heads, 1).flatten(0, 2).chunk(3)
            weights |= dict(zip(names, blocks, strict=True))
    assert np.abs(logits_of(weights, golden["tokens"]) - golden["logits"]).max() > 1


@pytest.mark.parametrize("tied", [0, 1])
def test_what_goes_out_again_is_the_file_that_hugging_face_wrote(tied, tmp_path):
    folder, _ = unpack("neox-hf", tmp_path)
    given = load_file(folder / "model.safetensors")
    if tied:
        given.pop("embed_out.weight")
        save_file(given, folder / "model.safetensors")
    choice = choose_rules("neox-hf", (*SIZES, f"tied={tied}"))
    store = str(tmp_path / "store")
    import_foreign(str(folder), checkpoint.open_store(store), Adoption(rules=choice))
    export_foreign(Whereabouts(store), str(tmp_path / "out"), Emigration("hf", rules=choice))
    back = load_file(tmp_path / "out/model.safetensors")
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in given.items())
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_state_of_transformers_5_in_memory_has_another_name_for_the_output_layer(tmp_path):
    folder, golden = unpack("neox-hf", tmp_path)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("embed_out.weight")
    torch.save(state, tmp_path / "state.pt")
    choice = choose_rules("neox-hf", (*SIZES, "lm_head=1"))
    store = checkpoint.open_store(str(tmp_path / "store"))
    import_foreign(str(tmp_path / "state.pt"), store, Adoption(rules=choice))
    weights = checkpoint.load(store).state["model"]
    assert np.abs(logits_of(weights, golden["tokens"]) - golden["logits"]).max() < 1e-4
