"""A training that every engine is given alike: a state, a step that changes all of it, a digest of its bits.

Imports nothing that only one of the two environments has.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch

_SCALE = 0.02  # of the weights, so that a codec meets what it meets in a model
_DECAY = 0.999
_PRODUCT = 512  # rows and columns of the matrices that a step multiplies
_BLOCK = 4096
_CALIBRATION_S = 1.0

State = dict[str, torch.Tensor]


class Engine(Protocol):
    """A way to keep checkpoints. What `save` and `fence` take is what the training is blocked for."""

    def save(self, state: State, step: int) -> None:
        """Make a checkpoint, or begin one; an engine that has no queue waits for the one before."""

    def fence(self) -> None:
        """Return when the state may be changed."""

    def settle(self) -> None:
        """Return when every checkpoint is durable."""

    def restore(self, state: State, step: int) -> State:
        """Read a checkpoint into the state's tensors, or into new ones if there is no other way."""

    def close(self) -> None:
        """Give everything back."""


def make_state(num_bytes: int, num_tensors: int, device: str) -> State:
    """Make float32 tensors of equal size, `num_bytes` together."""
    torch.manual_seed(0)
    size = num_bytes // num_tensors // 4
    shape = (size // 1024, 1024) if size % 1024 == 0 else (size,)
    return {
        f"layers.{i}.weight": torch.empty(shape, device=device).normal_(std=_SCALE)
        for i in range(num_tensors)
    }


class Step:
    """A training step: so many matrix products (forward and backward), and an update of every tensor."""

    def __init__(self, device: str) -> None:
        self._factors = [torch.randn(_PRODUCT, _PRODUCT, device=device) for _ in range(3)]

    def compute(self, num_products: int) -> None:
        """Do the forward and the backward."""
        left, right, out = self._factors
        for _ in range(num_products):
            torch.mm(left, right, out=out)

    def update(self, state: State) -> None:
        """Do what an optimizer does: change every tensor in place."""
        for tensor in state.values():
            tensor.mul_(_DECAY)
        synchronize(state.values())

    def products_per_s(self) -> float:
        """Measure how many products a second of this machine is worth now."""
        self.compute(4)
        done, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < _CALIBRATION_S:
            self.compute(8)
            synchronize(self._factors)
            done += 8
        return done / elapsed


def synchronize(tensors: Iterable[torch.Tensor]) -> None:
    """Wait for the device of tensors, if they have one to wait for."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Digest a state's bits, each with a weight of its place: equal states have equal digests.

    Any one changed word changes it. Its arithmetic is no engine's own.
    """
    total = 0
    for name in sorted(state):
        words = state[name].detach().cpu().contiguous().numpy().reshape(-1).view(np.uint32)
        whole = words.size // _BLOCK * _BLOCK
        columns = _odd(_BLOCK, np.uint32)
        rows = np.einsum("ij,j->i", words[:whole].reshape(-1, _BLOCK), columns).astype(np.uint64)
        tail = np.dot(words[whole:].astype(np.uint64), _odd(words.size - whole, np.uint64))
        part = int(np.dot(rows, _odd(rows.size, np.uint64))) + int(tail)
        total = (total * 31 + part) % (1 << 64)
    return f"{total:016x}"


def _odd(count: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return as many odd weights, always the same ones."""
    weights: np.ndarray = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, count, dtype) | dtype(1)
    return weights
