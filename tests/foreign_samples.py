"""What tests of foreign formats share: opening, comparing bit by bit, and writing."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.engine.tensors import dtype_name, raw_bytes, torch_dtype
from checkpoint.format.box import Box
from checkpoint.format.dtypes import DTYPES
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.contract import About, ForeignCheckpoint
from checkpoint.interop.formats.known import open_foreign, write_foreign
from checkpoint.interop.moves import Foreign

Tensors = Mapping[str, torch.Tensor]


class Given:
    """Contents made of torch tensors."""

    def __init__(self, tensors: Tensors, about: About | None = None) -> None:
        self.about = About("given") if about is None else about
        self.tensors = [Foreign(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
        self._arrays = [
            raw_bytes(tensor).view(DTYPES[dtype_name(tensor.dtype)].carrier).reshape(tensor.shape)
            for tensor in tensors.values()
        ]
        self.largest_read_bytes = 0

    def read(self, number: int, box: Box) -> "np.ndarray[Any, Any]":
        """Return the bits of a box, and remember how large the largest was."""
        array = self._arrays[number]
        part = np.ascontiguousarray(array[box.within(Box.whole(array.shape))]).reshape(box.size)
        self.largest_read_bytes = max(self.largest_read_bytes, part.nbytes)
        return part


def contents_of(checkpoint: ForeignCheckpoint) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    found = {}
    for number, tensor in enumerate(checkpoint.tensors):
        bits = checkpoint.read(number, Box.whole(tensor.shape))
        assert bits.shape == tensor.shape and bits.dtype == DTYPES[tensor.dtype].carrier
        data = torch.frombuffer(bytearray(bits.tobytes() or b"\0" * 16), dtype=torch_dtype(tensor.dtype))
        assert tensor.name not in found
        found[tensor.name] = data[: bits.size].reshape(tensor.shape)
    return found


def check_same(found: Tensors, expected: Tensors) -> None:
    """See that the same names have the same dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(found[name]).tobytes() == raw_bytes(tensor).tobytes(), name


def rewritten(source: Any, format: str, path: Path, budget_bytes: int = 1 << 20) -> ForeignCheckpoint:
    """Write contents in a format, and open what was written."""
    with drafting(str(path), "test") as draft:
        write_foreign(format, draft, source, budget_bytes)
    return open_foreign(str(path))


def of_every_dtype(but: tuple[str, ...] = (), seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of random bits, one of each dtype."""
    random = np.random.default_rng(seed)
    found = {}
    for name, dtype in DTYPES.items():
        if name not in but:
            bits = random.integers(0, 2 if name == "bool" else 256, (3, 4 * dtype.itemsize), np.uint8)
            found[f"of.{name}"] = torch.from_numpy(bits).view(torch_dtype(name))
    return found


def named(
    state: Mapping[str, Any], model: str = "model", optimizer: str = "optim"
) -> dict[str, torch.Tensor]:
    """Name the tensors of a nested state as the contract does, in a way of its own."""
    found = dict(state[model])
    for owner, entries in state.get(optimizer, {}).get("state", {}).items():
        found |= {f"optimizer.{kind}.{owner}": tensor for kind, tensor in entries.items()}
    return found


def some_boxes(shape: tuple[int, ...], seed: int = 0) -> Iterator[Box]:
    """Yield a few boxes within a shape, empty ones among them."""
    random = np.random.default_rng(seed)
    for _ in range(8):
        start = [int(random.integers(0, n + 1)) for n in shape]
        yield Box(
            tuple(start), tuple(int(random.integers(0, n - a + 1)) for a, n in zip(start, shape, strict=True))
        )
