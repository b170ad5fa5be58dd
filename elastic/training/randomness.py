"""Which random numbers are drawn where: a function of (seed, step, virtual rank), never of who draws them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
INITIAL = -1
"""The step and the virtual rank under which a model is initialised."""


def mix(*words: int) -> int:
    """Hash a sequence of integers to 64 bits (splitmix64, folded over the words)."""
    state = len(words)
    for word in words:
        state = (state ^ (word & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_for(seed: int, step: int, virtual_rank: int) -> int:
    """Seed for what one virtual rank draws in one step: 63 bits, as every generator accepts."""
    return mix(seed, step, virtual_rank) >> 1


@contextmanager
def keyed(key: int, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch's default generators (dropout draws from them) by `key`, and yield one more of our own.

    The two draw different numbers, and others than a generator that a job seeds with `key` itself. The
    default generators' former states come back at the end: nothing outside depends on what was drawn.
    """
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        # Not torch.manual_seed: it formats a stack trace for each kind of device that is not there.
        torch.default_generator.manual_seed(mix(key, 1) >> 1)
        if devices:
            torch.get_device_module(device).manual_seed_all(mix(key, 1) >> 1)
        yield torch.Generator(device=device).manual_seed(mix(key, 2) >> 1)


def make_deterministic(device: torch.device) -> None:
    """Let device kernels give the same bits each time; a kernel that cannot raises. CPU kernels need
    nothing.

    Has to be called before the first matrix product on the device, for cuBLAS reads its workspace's size
    only once.
    """
    if device.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
        torch.backends.cudnn.benchmark = False
