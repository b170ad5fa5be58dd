"""Makes a tiny GPT-NeoX with Hugging Face's own model and saves it, with the logits that it computes.

Run it in an environment that has transformers (5.23.0 made what is here), never in ours:

    python -m tests.interop.neox_make OUT [--load FOLDER]

OUT/checkpoint is what save_pretrained writes, or what was loaded; OUT/golden.npz has tokens and their logits.
"""

import argparse
import os

import numpy as np
import torch
from transformers import (  # type: ignore[import-not-found]  # it has an environment of its own
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)


def make() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=29,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        rotary_pct=0.5,
        max_position_embeddings=24,
    )
    model = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--load")
    options = parser.parse_args()
    model = GPTNeoXForCausalLM.from_pretrained(options.load) if options.load else make()
    tokens = torch.arange(2 * 12).reshape(2, 12) * 7 % 29
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    os.makedirs(options.out, exist_ok=True)
    model.save_pretrained(os.path.join(options.out, "checkpoint"))
    np.savez(os.path.join(options.out, "golden.npz"), tokens=tokens.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()
