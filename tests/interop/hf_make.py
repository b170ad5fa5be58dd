"""Makes tiny models with Hugging Face's own code and saves them, with the logits that they compute.

Run it in an environment that has transformers (5.23.0 made what is here), never in ours:

    python -m tests.interop.hf_make {gpt2,llama,mixtral} OUT [--load FOLDER]

OUT/checkpoint is what save_pretrained writes, or what was loaded; OUT/golden.npz has tokens and their logits.
"""

import argparse
import os
from typing import Any

import numpy as np
import torch
from transformers import (  # type: ignore[import-not-found]  # it has an environment of its own
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCAB = 29
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
}
MODELS = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=4),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**_SHAPE)),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
}


def make(name: str) -> Any:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("out")
    parser.add_argument("--load")
    options = parser.parse_args()
    kind, _ = MODELS[options.name]
    model = kind.from_pretrained(options.load) if options.load else make(options.name)
    tokens = torch.arange(2 * 12).reshape(2, 12) * 7 % VOCAB
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    os.makedirs(options.out, exist_ok=True)
    model.save_pretrained(os.path.join(options.out, "checkpoint"))
    np.savez(os.path.join(options.out, "golden.npz"), tokens=tokens.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()
