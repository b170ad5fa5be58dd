"""The made checkpoints, unpacked for a test; and what tests do with them."""

import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from checkpoint.format.box import Box
from checkpoint.interop.formats.contract import ForeignCheckpoint

MADE = Path(__file__).parent / "made"


def unpack(name: str, to: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Unpack a made checkpoint; return its folder and the tensors that the framework said it had."""
    with tarfile.open(MADE / f"{name}.tar.gz") as tar:
        tar.extractall(to, filter="data")
    with np.load(to / "golden.npz", allow_pickle=False) as golden:
        return to / "checkpoint", {key: golden[key] for key in golden.files}


def values_of(opened: ForeignCheckpoint, name: str) -> np.ndarray:
    """Read a whole floating tensor as float32 values."""
    number = next(n for n, tensor in enumerate(opened.tensors) if tensor.name == name)
    tensor = opened.tensors[number]
    bits = opened.read(number, Box.whole(tensor.shape))
    if tensor.dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(tensor.dtype).astype(np.float32)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let torch.load find classes by DeepSpeed's names, as files that it made name them."""
    made: dict[str, Any] = {
        "deepspeed.runtime.fp16.loss_scaler": {"LossScaler": type("LossScaler", (), {})},
        "deepspeed.runtime.zero.config": {
            "ZeroStageEnum": IntEnum("ZeroStageEnum", {"a": 1, "b": 2, "c": 3})
        },
        "deepspeed.utils.tensor_fragment": {"fragment_address": type("fragment_address", (), {})},
    }
    modules = {name: ModuleType(name) for name in ("deepspeed", *made)}
    for name, classes in made.items():
        for key, one in classes.items():
            one.__module__ = name
            setattr(modules[name], key, one)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file holds that one of our own scripts made."""
    with stand_ins():
        tree = torch.load(path, weights_only=False, map_location="cpu")
        change(tree)
        torch.save(tree, path)
