"""Virtual pipeline stages of Megatron's legacy files: each rank has several chunks of the model, in turns.

With P ranks and V chunks on each, chunk v of rank p has the layers from (v * P + p) * n on, n being how many
a chunk has; its file numbers them from 0. They are shown as P ranks without an interleaved schedule would
have them, so that the same rules read both. (Narayanan et al., SC 2021, on training with Megatron-LM.)
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.interop.moves import Foreign

_CHUNK = re.compile(r"model([0-9]{1,4})")
_OF_CHUNK = re.compile(r"((?:optimizer\.[^.]+\.)?)([0-9]+)/(.+)")
_LAYER = re.compile(r"((?!mtp\.)(?:.+\.)?layers\.)([0-9]+)(\..+)")

Chunks = Sequence[Collection[str]]  # of a rank: what the tensors of each are called, by `of_chunk`


def chunk_keys(tree: Mapping[Any, Any], path: str) -> list[str]:
    """Return the keys of a file's parts of the model, in order. Raises Corrupt if one is missing."""
    if "model" in tree:
        return ["model"]
    numbers = sorted(int(found[1]) for key in tree if (found := _CHUNK.fullmatch(str(key))))
    if not numbers or numbers != list(range(len(numbers))):
        raise Corrupt(f"{path} holds no model of Megatron's, or not all its chunks: {[*map(str, tree)][:8]}")
    return [f"model{number}" for number in numbers]


def of_chunk(number: int, name: str) -> str:
    """Return what a tensor of a chunk is called until it is `shown`."""
    return f"{number}/{name}"


def chunk_of(name: str) -> int:
    """Return of which chunk a tensor is; of the only one if no name says it."""
    found = _OF_CHUNK.fullmatch(name)
    return int(found[2]) if found else 0


class Stages:
    """Which layers each chunk of each pipeline rank has; made of the names of their tensors."""

    def __init__(self, ranks: Sequence[Chunks], where: str) -> None:
        self._ranks, self._chunks = len(ranks), len(ranks[0])
        if any(len(chunks) != self._chunks for chunks in ranks):
            raise Corrupt(f"{where} has ranks of {sorted(map(len, ranks))} virtual pipeline stages")
        counts = {_num_layers(names) for chunks in ranks for names in chunks}
        if len(counts) != 1 or 0 in counts:
            raise Unsupported(
                f"{where} has virtual pipeline stages of {sorted(counts)} layers, and only equal ones are "
                "read: load it in Megatron and save it with --ckpt-format torch_dist, which has none"
            )
        (self._layers,) = counts

    def shown(self, tensor: Foreign) -> Foreign:
        """Return a tensor of a chunk as that of a rank without virtual stages."""
        found = _OF_CHUNK.fullmatch(tensor.name)
        if found is None:
            return tensor
        state, chunk, name = found[1], int(found[2]), found[3]
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return replace(tensor, name=state + name)
        number = (chunk * self._ranks + tensor.at.get("pipeline", 0)) * self._layers + int(layer[2])
        stage, local = divmod(number, self._layers * self._chunks)
        named = f"{state}{layer[1]}{local}{layer[3]}"
        return replace(tensor, name=named, at={**tensor.at, "pipeline": stage})


def _num_layers(names: Collection[str]) -> int:
    """Return how many layers a chunk has; 0 if they are not numbered from 0 on."""
    own = [name.partition("/")[2] for name in names]
    numbers = {int(found[2]) for name in own if (found := _LAYER.fullmatch(name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0
