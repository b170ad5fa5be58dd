"""The next step of a training whose state came out of a checkpoint: a real model, AdamW, one fixed batch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

import checkpoint
from checkpoint.store.contract import Store

_HEAD_DIM = 2
_TOKENS = torch.tensor([[1, 12, 0, 7, 7], [3, 4, 11, 2, 9]])


class Decoder:
    """A GPT, a Llama with grouped queries or a mixture of experts, as its weights say; tied ones are one."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        made = {id(one): nn.Parameter(one.clone()) for one in weights.values()}
        self.at = {name: made[id(one)] for name, one in weights.items()}
        self._layers = sorted({name.split(".")[1] for name in weights if name.startswith("layers.")})

    def loss(self, tokens: Tensor) -> Tensor:
        """Return how badly each word but the last foretells the next."""
        hidden = functional.embedding(tokens, self.at["embedding.weight"])
        hidden = hidden + self.at["positions.weight"] if "positions.weight" in self.at else hidden
        for number in self._layers:
            layer = f"layers.{number}"
            hidden = hidden + self._attend(
                self._norm(hidden, f"{layer}.attention_norm"), f"{layer}.attention"
            )
            normal = self._norm(hidden, f"{layer}.mlp_norm")
            is_mixed = f"{layer}.router.weight" in self.at
            hidden = hidden + (self._mix(normal, layer) if is_mixed else self._think(normal, f"{layer}.mlp"))
        said = self._linear(self._norm(hidden, "final_norm"), "head")
        return functional.cross_entropy(said[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def _linear(self, given: Tensor, name: str) -> Tensor:
        return functional.linear(given, self.at[f"{name}.weight"], self.at.get(f"{name}.bias"))

    def _norm(self, given: Tensor, name: str) -> Tensor:
        weight, bias = self.at[f"{name}.weight"], self.at.get(f"{name}.bias")
        if bias is None:
            return functional.rms_norm(given, weight.shape, weight)
        return functional.layer_norm(given, weight.shape, weight, bias)

    def _attend(self, given: Tensor, name: str) -> Tensor:
        query, key, value = (
            self._linear(given, f"{name}.{one}").unflatten(-1, (-1, _HEAD_DIM)).transpose(1, 2)
            for one in "qkv"
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self._linear(seen.transpose(1, 2).flatten(2), f"{name}.out")

    def _think(self, given: Tensor, name: str) -> Tensor:
        inner = self._linear(given, f"{name}.up")
        if f"{name}.gate.weight" in self.at:
            return self._linear(inner * functional.silu(self._linear(given, f"{name}.gate")), f"{name}.down")
        return self._linear(functional.gelu(inner), f"{name}.down")

    def _mix(self, given: Tensor, layer: str) -> Tensor:
        chosen = self._linear(given, f"{layer}.router").softmax(-1)
        said = [self._think(given, f"{layer}.experts.{one}") for one in range(chosen.shape[-1])]
        return (torch.stack(said, -1) * chosen.unsqueeze(-2)).sum(-1)


def next_step(store: Store) -> dict[str, bytes]:
    """Take the next step from a checkpoint; return the bits of its loss, and of all weights after it."""
    state = checkpoint.load(store).state
    model = Decoder(state["model"])
    (group,), states = state["optimizer"]["param_groups"], state["optimizer"]["state"]
    optimizer = torch.optim.AdamW([model.at[name] for name in group["params"]], lr=group["lr"])
    numbered = {number: states[name] for number, name in enumerate(group["params"])}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
    loss = model.loss(_TOKENS)
    loss.backward()
    optimizer.step()
    found = {"the loss": loss.detach(), **{name: one.detach() for name, one in model.at.items()}}
    return {name: one.numpy().tobytes() for name, one in found.items()}
