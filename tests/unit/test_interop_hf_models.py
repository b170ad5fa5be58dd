"""Models that Hugging Face saved: what the rules read computes the logits that its own models computed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
from checkpoint.errors import Mismatch
from checkpoint.interop.builtin import find_document
from tests.interop.unpacking import unpack

MODELS = ("gpt2", "llama", "mixtral")
HEADS, HEAD_DIM, LAYERS, CHOSEN = 4, 4, 2, 2
Weights = dict[str, torch.Tensor]
# Mistakes in a document that no shape tells of: each pair of texts changes places, or a text is left out.
LIKE = {
    "gpt2": (
        ("attention.q.weight", "attention.k.weight"),
        ("attention.k.weight", "attention.v.weight"),
        ("attention.q.bias", "attention.k.bias"),
        ("attention.k.bias", "attention.v.bias"),
        ("ln_1", "ln_2"),
        ("attention.out.bias", "mlp.down.bias"),
        ('attention.out.weight", transpose: [1, 0]', 'attention.out.weight"'),
    ),
    "llama": (
        ("mlp.gate.weight", "mlp.up.weight"),
        ("attention.k.weight", "attention.v.weight"),
        ("attention.q.weight", "attention.out.weight"),
        ("attention_norm", "mlp_norm"),
        ("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "mixtral": (
        (".w1.", ".w3."),
        ("attention.k.weight", "attention.v.weight"),
        ("attention.q.weight", "attention.out.weight"),
        ("attention_norm", "mlp_norm"),
        ("model.embed_tokens.weight", "lm_head.weight"),
    ),
}
# Mistakes that shapes do tell of.
UNLIKE = {
    "gpt2": (
        ('c_attn.weight"\n    transpose: [1, 0]', 'c_attn.weight"'),
        ('mlp.up.weight", transpose: [1, 0]', 'mlp.up.weight"'),
        ('mlp.down.weight", transpose: [1, 0]', 'mlp.down.weight"'),
        ("wte", "wpe"),
    ),
    "llama": (("attention.q.weight", "attention.k.weight"), ("mlp.gate.weight", "mlp.down.weight")),
    "mixtral": (("attention.q.weight", "attention.k.weight"), (".w1.", ".w2.")),
}
# A rule for several tensors: what comes before and after the part of the name in which they differ.
SEVERAL = re.compile(r'  - from: "(.*){which:(.*)}(.*)"\n    to: "(.*){which}(.*)"\n((?:    when:.*\n)?)')


def imported(rules: str, folder: Path, store: str) -> Weights:
    adoption = checkpoint.Adoption(rules=checkpoint.choose_rules(rules, ()))
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
    weights = imported(f"{name}-hf", folder, str(tmp_path / "store"))
    found = logits_of(name, weights, golden["tokens"], config_of(folder))
    assert np.abs(found - golden["logits"]).max() < 1e-4 < np.abs(golden["logits"]).max() / 1000
    assert (found.argmax(-1) == golden["logits"].argmax(-1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_document_that_says_the_same_rule_by_rule_computes_the_same_logits(name, tmp_path):
    assert difference(name, spelt_out(find_document(f"{name}-hf")), tmp_path) < 1e-4


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name in MODELS for pair in LIKE[name]])
def test_a_document_with_a_mistake_that_fits_computes_other_logits(name, pair, tmp_path):
    assert difference(name, mistaken(name, pair), tmp_path) > 0.1


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name in MODELS for pair in UNLIKE[name]])
def test_a_document_with_a_mistake_that_does_not_fit_is_refused(name, pair, tmp_path):
    with pytest.raises(Mismatch, match="has the shape"):
        difference(name, mistaken(name, pair), tmp_path)


def mistaken(name: str, pair: tuple[str, str]) -> str:
    """Return a built-in document with two texts in each other's places; one within the other is left out."""
    text = spelt_out(find_document(f"{name}-hf"))
    one, other = pair
    assert one in text and other in text
    if other in one:
        return text.replace(one, other)
    return re.sub(
        f"{re.escape(one)}|{re.escape(other)}", lambda found: other if found[0] == one else one, text
    )


def spelt_out(text: str) -> str:
    """Return a document with a rule of its own for each of q, k, v and gate, up, down."""

    def each(found: re.Match[str]) -> str:
        before, which, after, head, tail, when = found.groups()
        return "".join(
            f'  - from: "{before}{one}{after}"\n    to: "{head}{one}{tail}"\n{when}'
            for one in which.split("|")
        )

    return SEVERAL.sub(each, text)


def difference(name: str, document: str, folder: Path) -> float:
    """Return how far the logits are from Hugging Face's where a checkpoint is read by a document."""
    given, golden = unpack(f"{name}-hf", folder)
    rules = folder / "rules.yaml"
    rules.write_text(document)
    weights = imported(str(rules), given, str(folder / "store"))
    found = logits_of(name, weights, golden["tokens"], config_of(given))
    return float(np.abs(found - golden["logits"]).max())


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_out_again_is_the_file_that_hugging_face_wrote(name, tmp_path):
    folder, _ = unpack(f"{name}-hf", tmp_path)
    imported(f"{name}-hf", folder, str(tmp_path / "store"))
    check_back(name, str(tmp_path / "store"), folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_by_way_of_megatron_s_tensor_ranks_it_is_the_same_file(name, tmp_path):
    folder, _ = unpack(f"{name}-hf", tmp_path)
    imported(f"{name}-hf", folder, str(tmp_path / "store"))
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
